"""Hosts serve what is on the owner's list: fetched from whoever has it, believed by digest, and let go of."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blocks.adapters import parameters_by_unit, read_parameters, unit_digest, versions
from blocks.source import ModelSource, find_model
from blocks.spans import Span
from peers.published.catalogue import Catalogue, Published, sign_catalogue
from swarm.adapters.files import LIST_FILE
from swarm.hosts.published import num_bytes_by_block
from tests.fakes_network import fake_swarm
from tests.private_runs import Owner
from tests.unit.blocks.conftest import save_tiny
from tests.unit.swarm.published_hosts import RUN, PublishedHost, PublishedSwarm, lying, other_values

FRONT, BACK, WHOLE = Span(0, 3), Span(3, 6), Span(0, 6)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    directory = tmp_path_factory.mktemp("llama")
    save_tiny("llama", directory)
    return find_model(str(directory), cache_dir=directory / "cache")


@pytest.fixture
async def swarm(source: ModelSource, tmp_path: Path) -> AsyncIterator[PublishedSwarm]:
    async with asyncio.timeout(60), fake_swarm() as network:
        made = PublishedSwarm(network=network, source=source, root=tmp_path)
        yield made
        await made.close()


def serves(host: PublishedHost, *adapters: Published) -> bool:
    """Whether a host has exactly these in its model, with the right values, and says so."""
    labels = {label for label in versions(host.model) if label.startswith("published-")}
    right = {host.shelf.label(each.content) for each in adapters} == labels
    for each in adapters:
        listed = host.shelf.content(each.content)
        label = host.shelf.label(each.content)
        if listed is None or label is None:
            return False
        for unit, named in read_parameters(parameters_by_unit(host.model, label)).items():
            block = int(unit.rpartition(".")[2])
            right = right and listed[32 * block : 32 * block + 32] == unit_digest(named)
    return right and host.announced[-1] == tuple(sorted(each.mark for each in adapters))


async def test_hosts_fetch_what_is_published_and_serve_it_with_its_values(swarm: PublishedSwarm) -> None:
    one, two = swarm.adapter("one"), swarm.adapter("two", value=0.25)
    front, back = await swarm.add("front", FRONT), await swarm.add("back", BACK)
    await swarm.publish(one)
    await swarm.follow()
    assert serves(front, one.adapter)
    assert serves(back, one.adapter)
    await swarm.publish(two, publisher="again")
    await swarm.follow()
    assert serves(front, one.adapter, two.adapter)


async def test_a_newcomer_fetches_from_hosts_when_the_owner_is_gone_also_blocks_that_these_only_keep(
    swarm: PublishedSwarm,
) -> None:
    one = swarm.adapter("one")
    await swarm.add("front", FRONT)
    await swarm.publish(one)
    await swarm.follow(times=3)
    await swarm.lose("owner")
    late = await swarm.add("late", WHOLE)
    assert serves(late, one.adapter)
    assert swarm.hosts["front"].files.here(one.adapter.content) == frozenset(range(6))


async def test_others_units_are_kept_only_as_far_as_there_is_room_on_disk(swarm: PublishedSwarm) -> None:
    each = next(iter(num_bytes_by_block(swarm.shapes).values()))
    front = await swarm.add("front", FRONT, spare_bytes=2 * each)
    one = swarm.adapter("one")
    await swarm.publish(one)
    await swarm.follow(times=3)
    assert serves(front, one.adapter)
    assert front.files.here(one.adapter.content) == frozenset(range(3)), "three more are not in two's room"


async def test_a_host_that_starts_again_serves_from_its_disk_at_once(swarm: PublishedSwarm) -> None:
    one = swarm.adapter("one")
    await swarm.add("front", FRONT)
    await swarm.publish(one)
    await swarm.follow()
    await swarm.lose("owner")
    await swarm.lose("front")
    back_again = await swarm.add("front", FRONT)
    assert back_again.announced[0] == (one.adapter.mark,), "it says so in its first record"
    await swarm.follow(times=2)
    assert serves(back_again, one.adapter)


async def test_what_is_torn_on_disk_is_fetched_again(swarm: PublishedSwarm) -> None:
    one = swarm.adapter("one")
    await swarm.add("front", FRONT)
    await swarm.publish(one)
    await swarm.follow()
    await swarm.lose("front")
    place = swarm.root / "front" / "published" / one.adapter.content.hex()
    (place / "block-1.safetensors").write_bytes(b"torn")
    front = await swarm.add("front", FRONT)
    assert serves(front, one.adapter)
    await swarm.lose("front")
    (place / LIST_FILE).write_bytes(b"x" * 192)
    assert serves(await swarm.add("front", FRONT), one.adapter)


async def test_units_of_other_values_on_disk_are_not_served(swarm: PublishedSwarm) -> None:
    one = swarm.adapter("one")
    front = await swarm.add("front", FRONT)
    await swarm.publish(one)
    await swarm.follow()
    front.files.save_unit(one.adapter.content, 1, other_values(one.units[1], 9.0))
    assert front.files.unit(one.adapter.content, 1) is None
    assert front.files.unit(one.adapter.content, 0) is not None


async def test_a_withdrawn_adapter_is_let_go_of_and_its_texts_end(swarm: PublishedSwarm) -> None:
    one, two = swarm.adapter("one"), swarm.adapter("two", value=0.25)
    front = await swarm.add("front", FRONT)
    await swarm.publish(one)
    await swarm.publish(two, publisher="again")
    await swarm.follow()
    ended: list[str] = []

    async def end_version(label: str) -> None:
        assert label in versions(front.model), "sessions end before their version goes"
        ended.append(label)

    front.shelf.end_version = end_version
    label = front.shelf.label(one.adapter.content)
    swarm.sign(swarm.catalogue.without("one"))
    await swarm.follow()
    assert ended == [label]
    assert serves(front, two.adapter)
    assert not (swarm.root / "front" / "published" / one.adapter.content.hex()).exists()


async def test_an_older_list_that_is_repeated_brings_nothing_back(swarm: PublishedSwarm) -> None:
    one = swarm.adapter("one")
    front = await swarm.add("front", FRONT)
    await swarm.publish(one)
    old = list(swarm.dht.blobs)
    await swarm.follow()
    swarm.sign(swarm.catalogue.without("one"))
    await swarm.follow()
    swarm.dht.blobs = old
    await swarm.follow()
    assert serves(front)
    await swarm.lose("front")
    assert serves(await swarm.add("front", FRONT)), "not even to a host that was started again"


async def test_another_owners_list_is_not_listened_to(swarm: PublishedSwarm, caplog: pytest.LogCaptureFixture) -> None:
    one = swarm.adapter("one")
    front = await swarm.add("front", FRONT)
    await swarm.serve("mallory", one, one.adapter)
    listed = replace(Catalogue(run=RUN).with_adapter(one.adapter), number=99)
    swarm.dht.blobs.append(sign_catalogue(listed, Owner(run=RUN).key))
    await swarm.follow()
    assert serves(front)
    assert "not signed by the run's owner" in caplog.text


async def test_a_unit_that_lies_is_taken_from_another(swarm: PublishedSwarm) -> None:
    one = swarm.adapter("one")
    front = await swarm.add("front", FRONT)
    swarm.sign(swarm.catalogue.with_adapter(one.adapter))
    await swarm.serve("liar", lying(one, 1, other_values(one.units[1], 7.0)), one.adapter)
    await swarm.follow()
    assert serves(front), "half an adapter is none"
    await swarm.serve("owner", one, one.adapter)
    await swarm.follow()
    assert serves(front), "who was lied to waits a little before it asks again"
    swarm.now += 16
    await swarm.follow()
    assert serves(front, one.adapter)


async def test_a_size_that_is_not_the_runs_is_refused_and_said_once(
    swarm: PublishedSwarm, caplog: pytest.LogCaptureFixture
) -> None:
    one = swarm.adapter("one")
    front = await swarm.add("front", FRONT)
    await swarm.serve("owner", one, one.adapter)
    swarm.sign(swarm.catalogue.with_adapter(replace(one.adapter, num_bytes=1)))
    for _ in range(3):
        await swarm.follow()
        swarm.now += 60
    assert serves(front)
    assert caplog.text.count("the list says 1 bytes") == 1


@pytest.mark.parametrize("place", ["allowed", "free"])
async def test_a_host_without_room_says_so_once_and_serves_what_fits(
    swarm: PublishedSwarm, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    needed = sum(list(num_bytes_by_block(swarm.shapes).values())[:3])
    one, two = swarm.adapter("one"), swarm.adapter("two", value=0.25)
    most, free = (needed + 1, 1 << 40) if place == "allowed" else (None, needed)
    front = await swarm.add("front", FRONT, most_bytes=most, free=free)
    await swarm.publish(one)
    await swarm.publish(two, publisher="again")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            await swarm.follow()
            swarm.now += 60
    assert len(front.shelf) == (1 if place == "allowed" else 0)
    for name in ("two",) if place == "allowed" else ("one", "two"):
        assert caplog.text.count(f"adapter '{name}' is not served here") == 1
    assert "--max-memory" in caplog.text


async def test_a_device_that_runs_out_of_memory_is_no_end(
    swarm: PublishedSwarm, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*given: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    front = await swarm.add("front", FRONT)
    monkeypatch.setattr("swarm.hosts.published_shelf.add_version", no_memory)
    await swarm.publish(swarm.adapter("one"))
    await swarm.follow()
    assert serves(front)
    assert "its device has no memory left" in caplog.text
