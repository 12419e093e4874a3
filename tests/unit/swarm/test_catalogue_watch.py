"""Each peer follows the newest list of its run's owner; hosts keep it and repeat it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from peers.published.catalogue import Catalogue, Published, sign_catalogue
from swarm.adapters.watch import LIST_NAME, CatalogueWatch
from tests.private_runs import Owner
from tests.unit.swarm.published_hosts import RUN, Shelves

OWNER, MALLORY = Owner(run=RUN), Owner(run=RUN)
PIRATE = Published(name="pirate", content=b"p" * 32, num_bytes=1000)
FIRST = Catalogue(run=RUN).with_adapter(PIRATE)
SECOND = FIRST.without("pirate")


class Dht(Shelves):
    """Which counts, and may have no other peer."""

    stored = 0
    is_alone = False

    async def store_published(self, run: str, blob: bytes, expires_at: float) -> bool:
        self.stored += 1
        return not self.is_alone and await super().store_published(run, blob, expires_at)


def watch(dht: Dht, state: Path) -> CatalogueWatch:
    return CatalogueWatch(dht, OWNER.public, RUN, state, lambda: 1000.0)


def signed(catalogue: Catalogue, owner: Owner = OWNER) -> bytes:
    return sign_catalogue(catalogue, owner.key)


async def test_the_newest_list_is_taken_and_an_older_one_never_again(tmp_path: Path) -> None:
    dht = Dht()
    one = watch(dht, tmp_path)
    assert (await one.look()).adapters == ()
    dht.blobs = [signed(FIRST)]
    assert (await one.look()).adapters == (PIRATE,)
    dht.blobs = [signed(FIRST), signed(SECOND)]
    assert (await one.look()).number == 2
    dht.blobs = [signed(FIRST)]
    assert (await one.look()).number == 2


async def test_a_host_repeats_the_newest_list_once_and_knows_it_after_a_restart(tmp_path: Path) -> None:
    dht = Dht()
    dht.blobs = [signed(SECOND)]
    one = watch(dht, tmp_path)
    await one.look()
    assert await one.keep()
    assert await one.keep()
    assert dht.stored == 1, "not again until it is about to expire"
    dht.blobs = [signed(FIRST)]
    again = watch(dht, tmp_path)
    assert (await again.read()).number == 2
    assert (await again.look()).number == 2, "an older one that somebody repeats brings nothing back"
    assert await again.keep()
    assert len(dht.blobs) == 2, "those who lack the newest find it again"


async def test_while_no_other_peer_takes_it_it_is_offered_again(tmp_path: Path) -> None:
    dht = Dht()
    dht.blobs, dht.is_alone = [signed(FIRST)], True
    one = watch(dht, tmp_path)
    await one.look()
    assert not await one.keep()
    assert not await one.keep()
    dht.is_alone = False
    assert await one.keep()
    assert dht.stored == 3


async def test_where_there_is_no_list_none_is_kept(tmp_path: Path) -> None:
    one = watch(Dht(), tmp_path)
    assert await one.keep()
    assert os.listdir(tmp_path) == []


async def test_rubbish_is_said_once_however_often_it_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dht = Dht()
    dht.blobs = [signed(FIRST, MALLORY), b"rubbish", signed(FIRST)]
    (tmp_path / LIST_NAME).write_bytes(signed(SECOND, MALLORY))
    one = watch(dht, tmp_path)
    with caplog.at_level(logging.WARNING):
        await one.read()
        for _ in range(3):
            assert (await one.look()).number == 1
    assert caplog.text.count("a list of adapters was skipped") == 3


async def test_a_full_disk_is_said_and_is_no_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dht = Dht()
    dht.blobs = [signed(FIRST)]
    one = watch(dht, tmp_path / "gone")
    await one.look()
    assert await one.keep()
    assert "cannot be written" in caplog.text
