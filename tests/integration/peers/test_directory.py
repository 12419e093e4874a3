"""One set of tests on the fake directory and on the real one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from blocks.spans import Span
from peers.directory import Directory
from peers.errors import BadRecord
from peers.hivemind_network import HivemindNetwork
from peers.network import PeerId
from peers.records import EvaluationRecord, PeerRecord, ProgressRecord, TrainerRecord, seal, seal_record
from tests.fakes import RUN, FakeDirectory, fake_peer_id, peer_record
from tests.integration.peers.conftest import Start

Wait = Callable[[float], Awaitable[None]]


@dataclass(frozen=True)
class Member:
    peer: PeerId
    directory: Directory


@dataclass(frozen=True)
class World:
    """Three peers' views of one directory, its clock, and a way to let that clock reach a moment."""

    ann: Member
    bob: Member
    eve: Member
    clock: Callable[[], float]
    until: Wait


@pytest.fixture(params=["fake", "hivemind"])
async def world(request: pytest.FixtureRequest, start: Start) -> World:
    if request.param == "fake":
        now = [time.time()]

        async def jump(moment: float) -> None:
            now[0] = moment

        shared = FakeDirectory(lambda: now[0])
        members = [Member(fake_peer_id(name), shared.view(fake_peer_id(name))) for name in ("ann", "bob", "eve")]
        return World(*members, clock=lambda: now[0], until=jump)
    ann = await start("ann")
    networks = [ann, *await asyncio.gather(start("bob", ann), start("eve", ann))]

    async def wait(moment: float) -> None:
        await asyncio.sleep(moment - time.time())

    return World(*(Member(n.peer_id, n.directory) for n in networks), clock=ann.dht_time, until=wait)


def host(world: World, member: Member, span: Span, *, life: float = 60.0, round_number: int = 3) -> PeerRecord:
    return replace(peer_record(member.peer, span, expires_at=world.clock() + life), round=round_number)


async def test_hosts_are_found_by_the_blocks_that_they_hold(world: World) -> None:
    low, high = host(world, world.ann, Span(0, 20)), host(world, world.bob, Span(20, 40))
    assert await world.ann.directory.publish(low)
    assert await world.bob.directory.publish(high)
    for member in (world.ann, world.bob, world.eve):
        assert await member.directory.find_hosts(RUN, Span(0, 20)) == [low]
        assert await member.directory.find_hosts(RUN, Span(18, 22)) == sorted([low, high], key=lambda r: r.peer)
        assert await member.directory.find_hosts(RUN, Span(39, 40)) == [high]
        assert await member.directory.find_hosts(RUN, Span(40, 60)) == []
        assert await member.directory.find_hosts("another", Span(0, 40)) == []


async def test_the_newest_record_of_a_peer_wins(world: World) -> None:
    await world.ann.directory.publish(host(world, world.ann, Span(0, 20), life=50, round_number=1))
    await world.ann.directory.publish(host(world, world.ann, Span(0, 20), life=60, round_number=2))
    assert [r.round for r in await world.bob.directory.find_hosts(RUN, Span(0, 1))] == [2]


async def test_a_record_is_gone_when_it_expires(world: World) -> None:
    for life in (3.0, 12.0, 48.0):  # a machine on which it is over before anybody has looked gives it a longer one
        record = host(world, world.ann, Span(0, 2), life=life)
        await world.ann.directory.publish(record)
        found = await world.bob.directory.find_hosts(RUN, Span(0, 2))
        if world.clock() < record.expires_at:
            break
    assert found == [record]
    await world.until(record.expires_at + 0.01)
    assert await world.bob.directory.find_hosts(RUN, Span(0, 2)) == []


async def test_progress_and_trainers_are_found_too(world: World) -> None:
    moving = ProgressRecord(
        run=RUN,
        peer=world.ann.peer,
        span=Span(15, 17),
        round=1,
        samples=5,
        total_samples=9,
        digests=b"0123456789abcdef",
        proposal=(2, world.clock() + 5, 1.5),
        expires_at=world.clock() + 60,
    )
    trainer = TrainerRecord(
        run=RUN,
        peer=world.bob.peer,
        nickname="bob",
        loss=2.5,
        tokens_per_second=10.0,
        step=4,
        round=1,
        expires_at=world.clock() + 60,
    )
    assert await world.ann.directory.publish(moving)
    assert await world.bob.directory.publish(trainer)
    assert await world.eve.directory.find_progress(RUN, Span(16, 40)) == [moving]
    assert await world.eve.directory.find_hosts(RUN, Span(0, 40)) == []
    assert await world.eve.directory.find_trainers(RUN) == [trainer]


async def test_what_trainers_measured_is_found_by_its_round(world: World) -> None:
    found = EvaluationRecord(
        run=RUN,
        peer=world.bob.peer,
        round=3,
        loss=2.5,
        tokens=7,
        label_set=b"12345678",
        labels=bytes(3000),
        expires_at=world.clock() + 60,
    )
    assert await world.bob.directory.publish(found)
    assert await world.eve.directory.find_evaluations(RUN, 3) == [found]
    assert await world.eve.directory.find_evaluations(RUN, 4) == []
    with pytest.raises(BadRecord, match="loss"):
        await world.bob.directory.publish(replace(found, loss=float("nan")))
    with pytest.raises(BadRecord, match="cannot sign"):
        await world.eve.directory.publish(found)


async def test_nobody_publishes_for_another_or_out_of_range(world: World) -> None:
    with pytest.raises(BadRecord, match="cannot sign"):
        await world.eve.directory.publish(host(world, world.ann, Span(0, 2)))
    with pytest.raises(BadRecord, match="nickname"):
        await world.ann.directory.publish(replace(host(world, world.ann, Span(0, 2)), nickname="x" * 100))


async def test_the_runs_settings_are_kept_by_any_member_and_checked_by_the_reader(world: World) -> None:
    assert await world.bob.directory.find_run(RUN, lambda blob: True) is None
    assert await world.eve.directory.store_run(RUN, b"forged", world.clock() + 60)
    assert await world.ann.directory.store_run(RUN, b"good" * 1000, world.clock() + 60)
    assert await world.bob.directory.find_run(RUN, lambda blob: blob.startswith(b"good")) == b"good" * 1000
    assert await world.bob.directory.find_run(RUN, lambda blob: blob == b"better") is None
    with pytest.raises(BadRecord, match="at most 4096"):
        await world.ann.directory.store_run(RUN, b"x" * 5000, world.clock() + 60)


async def store_raw(network: HivemindNetwork, blob: bytes, owner: PeerId, expires_at: float) -> bool:
    key = f"swarmtune/{RUN}/peer/0"
    stored = await network.dht_node.store(key, blob, expires_at, subkey=str(owner), exclude_self=True)
    return bool(stored)


async def test_a_forged_entry_neither_replaces_nor_hides_the_real_one(start: Start) -> None:
    ann = await start("ann")
    bob, eve = await asyncio.gather(start("bob", ann), start("eve", ann))
    now = ann.dht_time()
    real = peer_record(ann.peer_id, Span(0, 2), expires_at=now + 60)
    await ann.directory.publish(real)
    forged = replace(peer_record(eve.peer_id, Span(0, 2), expires_at=now + 100), nickname="eve")
    rubbish = [
        (b"rubbish", now + 100),
        (seal_record(eve.identity, forged), now + 100),  # well signed, but not by the peer whose place it takes
        (seal_record(ann.identity, real), now + 200),  # the real one, made to outlive its own signature
        (seal(eve.identity, "peer", {"peer": ann.peer_id, "expires_at": now + 100}), now + 100),
    ]
    for blob, expires_at in rubbish:
        assert not await store_raw(eve, blob, ann.peer_id, expires_at)
    for network in (ann, bob):
        assert await network.directory.find_hosts(RUN, Span(0, 2)) == [real]


async def test_a_wellsigned_entry_that_says_nonsense_is_skipped_and_counted(start: Start) -> None:
    ann = await start("ann")
    bob, eve = await asyncio.gather(start("bob", ann), start("eve", ann))
    now = ann.dht_time()
    real = peer_record(ann.peer_id, Span(0, 2), expires_at=now + 60)
    await ann.directory.publish(real)
    nonsense = seal(eve.identity, "peer", {"peer": eve.peer_id, "run": RUN, "expires_at": now + 60, "span": [9, 2]})
    assert await store_raw(eve, nonsense, eve.peer_id, now + 60)
    assert await bob.directory.find_hosts(RUN, Span(0, 2)) == [real]
    assert bob.directory.num_refused == 1


async def test_a_hostile_holder_of_a_key_cannot_make_others_believe_it(start: Start, tmp_path: Path) -> None:
    ann = await start("ann")
    bob, eve = await asyncio.gather(start("bob", ann), start("eve", ann))
    now = ann.dht_time()
    real = peer_record(ann.peer_id, Span(0, 2), expires_at=now + 60)
    await ann.directory.publish(real)
    eve.dht_node.protocol.record_validator = None  # eve's node stores, and passes on, whatever eve likes
    key = f"swarmtune/{RUN}/peer/0"
    await eve.dht_node.store(key, b"rubbish", now + 500, subkey=str(ann.peer_id))
    assert await bob.directory.find_hosts(RUN, Span(0, 2)) == [real]
