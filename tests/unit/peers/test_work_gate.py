"""The gate before a service: what passes while it is closed, and when nobody is at it any more."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from blocks.spans import Span
from blocks.training.ledger import MicrobatchId
from peers.errors import Refused
from peers.network import PeerId
from peers.streams.calls import Answer, Question
from peers.streams.messages import (
    Backward,
    CloseSession,
    Collect,
    Commit,
    Drop,
    Evaluate,
    Forward,
    Message,
    OpenLane,
    OpenSession,
    RefusalCode,
)
from peers.streams.send_limit import SendLimit
from peers.streams.work_gate import MOST_SECONDS_BEHIND, WorkGate

ME, ANN = PeerId("me"), PeerId("ann")
ID = MicrobatchId(trainer=ANN, life=1, step=1, index=0)
NEW: list[Message] = [
    OpenLane(lane="l", span=Span(0, 1)),
    Forward(lane="l", microbatch=ID, samples=1),
    Evaluate(lane="l", item="i"),
    OpenSession(session="s", span=Span(0, 1), batch=1, max_length=8),
]
BEGUN: list[Message] = [
    Backward(lane="l", microbatch=ID, tokens=1),
    Commit(microbatch=ID, span=Span(0, 1)),
    Drop(microbatch=ID),
    Collect(place="l", item="i"),
    CloseSession(session="s"),
]


@dataclass
class Service:
    """Notes what comes through; answers when `go` is set."""

    asked: list[Message] = field(default_factory=list)
    came: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    closed: list[int] = field(default_factory=list)
    go: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, question: Question) -> Answer:
        self.asked.append(question.message)
        self.came.release()
        await self.go.wait()
        return Answer()

    async def stream_closed(self, peer: PeerId, stream: int) -> None:
        self.closed.append(stream)


class Clock:
    def __init__(self) -> None:
        self.now = 10.0

    def __call__(self) -> float:
        return self.now


def gate(service: Service, limit: SendLimit | None = None, clock: Clock | None = None) -> WorkGate:
    service.go.set()
    return WorkGate(service, ME, limit or SendLimit(), clock or Clock())


def ask(message: Message, peer: PeerId = ANN, stream: int = 1) -> Question:
    return Question(peer=peer, stream=stream, message=message)


async def test_an_open_gate_lets_everything_through() -> None:
    service = Service()
    opened = gate(service)
    for message in NEW + BEGUN:
        await opened.answer(ask(message))
    assert service.asked == NEW + BEGUN


@pytest.mark.parametrize("message", NEW, ids=lambda message: message.kind)
async def test_a_closed_gate_refuses_new_work_and_says_why(message: Message) -> None:
    service = Service()
    closed = gate(service)
    closed.why = "this host is paused"
    with pytest.raises(Refused, match="this host is paused") as caught:
        await closed.answer(ask(message))
    assert caught.value.code == RefusalCode.BUSY
    assert not service.asked


async def test_what_was_begun_goes_on_through_a_closed_gate_and_so_does_this_peers_own_work() -> None:
    service = Service()
    closed = gate(service)
    closed.why = "this host is paused"
    for message in BEGUN:
        await closed.answer(ask(message))
    for message in NEW:
        await closed.answer(ask(message, peer=ME))
    assert service.asked == BEGUN + NEW


async def test_a_host_whose_limit_is_far_behind_takes_no_new_work() -> None:
    service, clock = Service(), Clock()
    limit = SendLimit(1000.0, clock)
    slow = gate(service, limit, clock)
    await limit.take(int(1000 * (MOST_SECONDS_BEHIND + 10)))
    with pytest.raises(Refused, match=r"bandwidth limit is \d+ s behind; try another host"):
        await slow.answer(ask(NEW[0]))
    await slow.answer(ask(BEGUN[0]))
    clock.now += 15
    await slow.answer(ask(NEW[0]))


async def test_questions_are_counted_while_they_are_answered_but_not_ones_own() -> None:
    service = Service()
    opened = gate(service)
    service.go.clear()
    tasks = [asyncio.create_task(opened.answer(ask(NEW[1], peer=peer))) for peer in (ANN, ANN, ME)]
    async with asyncio.timeout(30):
        for _ in range(3):
            await service.came.acquire()
        assert opened.answering == 2
        tasks[0].cancel()
        service.go.set()
        await asyncio.wait(tasks)
    assert opened.answering == 0


async def test_it_is_quiet_without_trainers_or_when_they_have_asked_nothing_for_a_while() -> None:
    service, clock = Service(), Clock()
    opened = gate(service, clock=clock)
    await opened.answer(ask(BEGUN[0], stream=7))
    assert opened.is_quiet(1.0), "a stream without a lane is no trainer's"
    assert not opened.has_trainers
    await opened.answer(ask(NEW[0], stream=8))
    assert not opened.is_quiet(1.0)
    clock.now += 1.0
    assert opened.is_quiet(1.0)
    assert opened.has_trainers
    await opened.answer(ask(BEGUN[0], stream=8))
    assert not opened.is_quiet(1.0)
    await opened.stream_closed(ANN, 8)
    assert opened.is_quiet(1.0)
    assert not opened.has_trainers
    assert service.closed == [8]
