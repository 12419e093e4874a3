"""A send limit holds, measured in bytes that arrive on a real stream in a window of time."""

from __future__ import annotations

import asyncio
import time

import pytest
import torch

from peers.network import PeerId
from peers.streams.answering import CallServer
from peers.streams.calls import Answer, Question, hello_maker
from peers.streams.messages import AskInfo
from peers.streams.pool import Pool
from peers.streams.send_limit import BURST_SECONDS, SendLimit
from peers.streams.traffic import Traffic
from tests.fakes import RUN
from tests.integration.peers.conftest import Start

HELLO = hello_maker(RUN, "swarmtune 1")
RATE = 400_000  # bytes per second, far below what loopback carries
MESSAGE = 50_000
SECONDS = 3.0


class Counter:
    """Answers with as much as it is asked with, and counts what came."""

    def __init__(self, echoes: bool) -> None:
        self.received, self._echoes = 0, echoes

    async def answer(self, question: Question) -> Answer:
        self.received += sum(tensor.numel() for tensor in question.tensors)
        return Answer(tensors=question.tensors if self._echoes else ())

    async def stream_closed(self, peer: PeerId, stream: int) -> None:
        """Nothing is kept."""


async def ask_without_end(pool: Pool, peer: PeerId) -> None:
    load = torch.zeros(MESSAGE, dtype=torch.uint8)
    while True:
        await pool.call(peer, "info", AskInfo(), (load,), seconds=60)


async def probe(pool: Pool, peer: PeerId) -> float:
    began = time.monotonic()
    await pool.call(peer, "train", AskInfo(), seconds=60)
    return time.monotonic() - began


@pytest.mark.parametrize("who", ["asks", "answers"])
async def test_what_leaves_in_some_seconds_is_what_the_limit_allows(start: Start, who: str) -> None:
    ann = await start("ann")
    bob = await start("bob", ann)
    limited, free = Traffic(limit=SendLimit(RATE)), Traffic()
    counter = Counter(echoes=who == "answers")
    bobs, anns = (free, limited) if who == "asks" else (limited, free)
    for kind in ("info", "train"):
        await bob.serve_stream(kind, CallServer(HELLO, counter, bobs).serve)
    pool = Pool(ann, HELLO, anns, {})
    async with asyncio.timeout(60):
        await probe(pool, bob.peer_id)
        before, began = limited.total.sent, time.monotonic()
        tasks = [asyncio.create_task(ask_without_end(pool, bob.peer_id)) for _ in range(4)]  # more than the limit lets
        await asyncio.sleep(SECONDS)
        small = await probe(pool, bob.peer_id)
        sent, seconds = limited.total.sent - before, time.monotonic() - began
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await pool.close()
    assert sent <= RATE * (seconds + BURST_SECONDS) + MESSAGE + 8192, "more left than the limit allows"
    assert sent >= RATE * seconds * 0.5, "less left than the limit allows"
    assert counter.received >= sent * 0.5, "what was counted was not what arrived"
    assert small < SECONDS / 2, "a small message waited behind large ones"
