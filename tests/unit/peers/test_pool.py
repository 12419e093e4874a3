"""A peer that is frozen is told from one that is slow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from peers.errors import PeerLost
from peers.network import PeerId
from peers.streams.answering import CallServer, Handler
from peers.streams.calls import Answer, Question, hello_maker
from peers.streams.messages import AskInfo, CloseSession
from peers.streams.pool import Pool
from peers.streams.traffic import Traffic
from tests.fakes_network import FakeSwarm, fake_swarm

BOB = PeerId("bob")
HELLO = hello_maker("run", "test")
LONG = CloseSession(session="takes long")


class Slow(Handler):
    """Answers a question of `train` when it is told to, and one of `info` at once."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.asked_thrice = asyncio.Event()
        self.go = asyncio.Event()
        self._asked = 0

    async def answer(self, question: Question) -> Answer:
        if isinstance(question.message, AskInfo):
            self._asked += 1
            if self._asked >= 3:
                self.asked_thrice.set()
            return Answer()
        self.begun.set()
        await self.go.wait()
        return Answer()

    async def stream_closed(self, peer: PeerId, stream: int) -> None:
        pass


@pytest.fixture
async def swarm() -> AsyncIterator[FakeSwarm]:
    async with asyncio.timeout(20), fake_swarm() as swarm:
        yield swarm


@pytest.fixture
async def slow(swarm: FakeSwarm) -> Slow:
    slow = Slow()
    bob = swarm.join("bob")
    for kind in ("train", "info"):
        await bob.serve_stream(kind, CallServer(HELLO, slow, Traffic()).serve)
    return slow


async def test_a_slow_peer_that_says_it_is_there_has_all_its_time(swarm: FakeSwarm, slow: Slow) -> None:
    pool = Pool(swarm.join("ann"), HELLO, Traffic(), {}, quiet_seconds=0.01, probe_seconds=5)
    call = asyncio.create_task(pool.call(BOB, "train", LONG, seconds=30))
    await slow.asked_thrice.wait()
    assert not call.done()
    slow.go.set()
    await call
    await pool.close()


async def test_a_frozen_peer_is_lost_long_before_the_deadline(swarm: FakeSwarm, slow: Slow) -> None:
    pool = Pool(swarm.join("ann"), HELLO, Traffic(), {}, quiet_seconds=0.05, probe_seconds=0.2)
    call = asyncio.create_task(pool.call(BOB, "train", LONG, seconds=3600))
    await slow.begun.wait()
    swarm.find(BOB).stall()
    with pytest.raises(PeerLost, match="silent for 0 s"):
        await call
    await pool.close()
