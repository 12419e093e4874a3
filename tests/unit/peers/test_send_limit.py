"""A peer's send limit: what leaves in any time, in which order, and what waiting too long costs."""

from __future__ import annotations

import asyncio
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peers.errors import OverLimit, Refused
from peers.network import PeerId
from peers.streams.answering import CallServer
from peers.streams.calls import Answer, Question, hello_maker
from peers.streams.messages import AskInfo, CloseSession, RefusalCode
from peers.streams.pool import Pool
from peers.streams.send_limit import BURST_SECONDS, SMALL_BYTES, Pace, SendLimit
from peers.streams.traffic import Traffic
from peers.streams.wire import sent_bytes
from peers.streams.wire_format import WireFormat
from tests.fakes_network import fake_swarm

RATE = 1000.0
HELLO = hello_maker("run-1", "swarmtune 1")
BOB = PeerId("bob")


@given(
    messages=st.lists(
        st.tuples(st.floats(0, 20), st.integers(1, 5000)),
        min_size=1,
        max_size=40,  # seconds since the one before, size
    )
)
def test_in_any_time_leaves_the_rate_one_burst_and_one_message_at_most(messages: list[tuple[float, int]]) -> None:
    pace, now, turn, left = Pace(RATE), 100.0, 0.0, []
    for quiet, size in messages:
        now += quiet
        before, turn = turn, now + pace.seconds_behind(now)
        assert turn >= before, "a message overtook one that was given earlier"
        left.append((turn, size))
        pace = pace.after(size, now)
    largest = max(size for _, size in left)
    for first, last in itertools.combinations_with_replacement(range(len(left)), 2):
        seconds = left[last][0] - left[first][0]
        sent = sum(size for _, size in left[first : last + 1])
        assert sent <= RATE * (seconds + BURST_SECONDS) + largest + 1e-6


@given(sizes=st.lists(st.integers(1, 5000), min_size=2, max_size=40))
def test_a_queue_leaves_at_exactly_the_rate(sizes: list[int]) -> None:
    pace = Pace(RATE, paid_until=100.0)
    for size in sizes:
        pace = pace.after(size, 100.0)
    assert pace.seconds_behind(100.0) == pytest.approx(sum(sizes) / RATE)


def test_a_message_of_any_size_goes_when_what_went_before_it_is_paid_for() -> None:
    pace = Pace(RATE).after(60_000, 10.0)  # a minute's worth
    assert Pace(RATE).seconds_behind(10.0) == 0
    assert pace.seconds_behind(10.0) == pytest.approx(60 - BURST_SECONDS)
    assert pace.without(60_000).seconds_behind(10.0) == 0


def test_quiet_is_made_up_for_only_for_a_moment() -> None:
    pace = Pace(RATE).after(1, 0.0)
    after_an_hour = pace.after(int(RATE), 3600.0)
    assert after_an_hour.seconds_behind(3600.0) == pytest.approx(1 - BURST_SECONDS)


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


async def test_small_messages_wait_for_nothing_and_are_counted() -> None:
    limit = SendLimit(RATE, Clock())
    await limit.take(100_000)
    behind = limit.seconds_behind()
    async with asyncio.timeout(30):  # the debt is of 100 s
        await limit.take(SMALL_BYTES)
    assert limit.seconds_behind() == pytest.approx(behind + SMALL_BYTES / RATE)


async def test_what_would_wait_too_long_is_refused_at_once_and_not_counted() -> None:
    limit = SendLimit(RATE, Clock(), name="ann")
    await limit.take(100_000)
    behind = limit.seconds_behind()
    with pytest.raises(OverLimit, match=r"bandwidth limit of ann \(0\.008 Mbit/s\) is 100 s behind.*--max-bandwidth"):
        await limit.take(SMALL_BYTES + 1, seconds=30)
    assert limit.seconds_behind() == behind


async def test_what_is_given_up_while_it_waits_is_not_counted() -> None:
    limit = SendLimit(RATE, Clock())
    await limit.take(100_000)
    behind = limit.seconds_behind()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await limit.take(50_000)
    assert limit.seconds_behind() == pytest.approx(behind)


async def test_without_a_limit_nothing_waits() -> None:
    limit = SendLimit()
    async with asyncio.timeout(30):
        for _ in range(100):
            await limit.take(1 << 40, seconds=0)
    assert (limit.is_limited, limit.seconds_behind(), limit.megabits_per_second) == (False, 0.0, 0.0)
    assert SendLimit(2.5e6).megabits_per_second == pytest.approx(20)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_limit_that_lets_nothing_through_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="lets nothing through"):
        SendLimit(rate)


@pytest.mark.parametrize("wire", [None, *WireFormat])
async def test_what_is_taken_is_what_travels(wire: WireFormat | None) -> None:
    tensors = (torch.randn(3, 70, 64), torch.ones(3, 70, dtype=torch.uint8))
    async with asyncio.timeout(20), fake_swarm() as swarm:
        await swarm.join("bob").serve_stream("info", CallServer(HELLO, Quiet(), Traffic()).serve)
        traffic = Traffic()
        pool = Pool(swarm.join("ann"), HELLO, traffic, {})
        await pool.call(BOB, "info", AskInfo(), tensors, seconds=10, wire=wire)
        sent = traffic.by_kind[AskInfo.kind].sent
        await pool.close()
    assert sent == pytest.approx(sent_bytes(tensors, wire), abs=300)


class Quiet:
    """Answers with nothing, or with as many zeros as a session's name says."""

    async def answer(self, question: Question) -> Answer:
        message = question.message
        size = int(message.session) if isinstance(message, CloseSession) else 0
        return Answer(tensors=(torch.zeros(size, dtype=torch.uint8),) if size else ())

    async def stream_closed(self, peer: PeerId, stream: int) -> None:
        """Nothing is kept."""


async def test_a_call_that_its_own_limit_delays_too_long_blames_nobody() -> None:
    async with asyncio.timeout(20), fake_swarm() as swarm:
        await swarm.join("bob").serve_stream("info", CallServer(HELLO, Quiet(), Traffic()).serve)
        pool = Pool(swarm.join("ann"), HELLO, Traffic(limit=SendLimit(RATE)), {})
        large = (torch.zeros(100_000, dtype=torch.uint8),)
        await pool.call(BOB, "info", AskInfo(), large, seconds=10)  # in debt, at once
        with pytest.raises(Refused, match="bandwidth limit of this peer") as caught:
            await pool.call(BOB, "info", AskInfo(), large, seconds=10)
        assert caught.value.code == RefusalCode.BUSY
        await pool.call(BOB, "info", AskInfo(), seconds=10)
        await pool.close()


async def test_answers_go_out_under_the_limit_and_small_ones_overtake() -> None:
    limit = SendLimit(RATE)
    async with asyncio.timeout(20), fake_swarm() as swarm:
        await swarm.join("bob").serve_stream("info", CallServer(HELLO, Quiet(), Traffic(limit=limit)).serve)
        pool = Pool(swarm.join("ann"), HELLO, Traffic(), {})
        await pool.call(BOB, "info", CloseSession(session="100000"), seconds=10)
        assert limit.seconds_behind() > 90
        held = asyncio.create_task(pool.call(BOB, "info", CloseSession(session="5000"), seconds=10))
        await pool.call(BOB, "info", CloseSession(session="1000"), seconds=10)
        assert limit.seconds_behind() > 95, "the answer that waits was not counted"
        assert not held.done()
        held.cancel()
        await asyncio.wait([held])
        await pool.close()
