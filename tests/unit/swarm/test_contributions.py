"""What a peer has given: added up over its hosts and its starts, and kept in a file that may be damaged."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import threading
from pathlib import Path

import pytest

from peers.network import PeerId
from peers.records import MAX_GIVEN_TOKENS
from swarm.hosts import contributions
from swarm.hosts.contributions import FILE_NAME, Contributions, Given, load_given, save_given
from tests.logged import logged_by

ANN, BOB = PeerId("ann"), PeerId("bob")


class Host:
    """Counts up from nothing, as a host that was just loaded does."""

    def __init__(self) -> None:
        self.given = Given()

    def gives(self, *, served: int = 0, trained: int = 0) -> None:
        self.given = self.given.plus(Given(served_tokens=served, trained_tokens=trained))


async def test_a_peer_goes_on_counting_when_it_moves_and_when_it_is_started_again(tmp_path: Path) -> None:
    peer, first, second = Contributions(tmp_path, ANN), Host(), Host()
    peer.begin(lambda: first.given)
    first.gives(served=5, trained=100)
    peer.end()
    first.gives(served=1000)  # nobody asks it any more
    peer.begin(lambda: second.given)
    second.gives(served=2)
    assert peer.total() == Given(served_tokens=7, trained_tokens=100)
    assert peer.is_news
    assert await peer.save() == peer.total()
    assert not peer.is_news
    again = Contributions(tmp_path, ANN)
    assert again.total() == Given(served_tokens=7, trained_tokens=100)
    third = Host()
    third.gives(trained=1)
    again.begin(lambda: third.given)
    again.begin(lambda: Given(served_tokens=3))  # another span took its place at once
    assert again.total() == Given(served_tokens=10, trained_tokens=101)


def test_another_identity_in_the_same_place_begins_with_nothing(tmp_path: Path) -> None:
    save_given(tmp_path / FILE_NAME, ANN, Given(served_tokens=5))
    assert load_given(tmp_path / FILE_NAME, BOB) == Given()
    assert load_given(tmp_path / FILE_NAME, ANN) == Given(served_tokens=5)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"peer": "ann", "served_tokens": 5, "trained_to',
        b"\xff\xfe",
        b"[" * 4000,
        b'{"peer": "ann", "served_tokens": -1, "trained_tokens": 0}',
        b'{"peer": "ann", "served_tokens": 9007199254740993, "trained_tokens": 0}',
        b'{"peer": "ann", "served_tokens": 1e6, "trained_tokens": 0}',
        b'{"peer": "ann", "served_tokens": true, "trained_tokens": 0}',
        b'{"peer": "ann", "served_tokens": 5}',
        b" " * 5000 + b'{"peer": "ann", "served_tokens": 5, "trained_tokens": 0}',
        b"[]",
    ],
)
async def test_a_damaged_file_costs_the_count_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    peer = Contributions(tmp_path, ANN)
    assert peer.total() == Given()
    assert "counted anew" in caplog.text
    peer.begin(lambda: Given(served_tokens=1))
    await peer.save()
    assert load_given(tmp_path / FILE_NAME, ANN) == peer.total(), "the next start has it whole"


async def test_the_file_is_written_only_where_there_is_news(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Given] = []
    monkeypatch.setattr(contributions, "save_given", lambda path, peer, given: written.append(given))
    peer, host = Contributions(tmp_path, ANN), Host()
    peer.begin(lambda: host.given)
    await peer.save()
    host.gives(trained=1)
    for _ in range(3):
        await peer.save()
    assert written == [Given(trained_tokens=1)]


def test_a_file_that_is_replaced_or_is_not_leaves_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for number in (1, 2):
        save_given(tmp_path / FILE_NAME, ANN, Given(trained_tokens=number))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_given(tmp_path / FILE_NAME, ANN, Given(trained_tokens=3))
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME], "no draft is left"
    assert json.loads((tmp_path / FILE_NAME).read_text())["trained_tokens"] == 2


async def test_a_disk_that_takes_nothing_does_not_stop_the_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "state"
    peer = Contributions(state, ANN)  # there is no such directory
    peer.begin(lambda: Given(trained_tokens=4))
    with caplog.at_level(logging.WARNING):
        assert await peer.save() == Given(trained_tokens=4)
    assert "was not written" in caplog.text
    caplog.clear()
    assert await peer.save() == Given(trained_tokens=4)
    assert not logged_by(contributions, caplog), "said once for each change"


async def test_a_save_that_waits_for_another_writes_the_newer_total(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    peer, host, go = Contributions(tmp_path, ANN), Host(), threading.Event()
    peer.begin(lambda: host.given)

    def slowly(path: Path, owner: PeerId, given: Given) -> None:
        go.wait(30)
        written.append(given.trained_tokens)

    monkeypatch.setattr(contributions, "save_given", slowly)
    host.gives(trained=1)
    first = asyncio.create_task(peer.save())
    await asyncio.sleep(0)
    second = asyncio.create_task(peer.save())
    host.gives(trained=1)
    await asyncio.sleep(0)
    go.set()
    assert [(await each).trained_tokens for each in (first, second)] == written == [1, 2]


def test_no_total_is_more_than_a_record_tells() -> None:
    most = Given(served_tokens=MAX_GIVEN_TOKENS, trained_tokens=MAX_GIVEN_TOKENS - 1)
    assert most.plus(Given(served_tokens=1, trained_tokens=5)) == Given(
        served_tokens=MAX_GIVEN_TOKENS, trained_tokens=MAX_GIVEN_TOKENS
    )
    assert Given(served_tokens=2).plus(Given(served_tokens=-5)) == Given()
