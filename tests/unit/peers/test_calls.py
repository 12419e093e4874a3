"""Questions and answers between peers that lie, stall and die."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blocks.errors import BadSession
from peers.errors import BadMessage, NetworkFailed, PeerLost, Refused, StreamClosed
from peers.network import ByteStream, PeerId
from peers.streams import answering, calls
from peers.streams.answering import CallServer
from peers.streams.calls import Answer, Caller, Question, dial, hello_maker
from peers.streams.fields import to_body
from peers.streams.messages import PROTOCOL_MAX, PROTOCOL_MIN, AskInfo, CloseSession, Hello, RefusalCode
from peers.streams.pool import Pool
from peers.streams.traffic import Traffic
from peers.streams.wire import Frame, read_frame, write_frame
from tests.errors_page import met
from tests.fakes_network import FakeSwarm, fake_swarm

HELLO = hello_maker("run-1", "swarmtune 1", clock=lambda: 5.0)
BOB = PeerId("bob")


class Echo:
    """Gives tensors back. Sessions named `wait` answer when `go` is set, `bad` and `bug` fail."""

    def __init__(self) -> None:
        self.closed: list[tuple[str, int]] = []
        self.asked: list[str] = []
        self.cancelled: list[str] = []
        self.go, self.waiting, self.ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def answer(self, question: Question) -> Answer:
        message = question.message
        name = message.session if isinstance(message, CloseSession) else ""
        self.asked.append(name)
        if name == "wait":
            self.waiting.set()
            try:
                await self.go.wait()
            except asyncio.CancelledError:
                self.cancelled.append(name)
                raise
        if name == "bad":
            raise BadSession("no such session")
        if name == "bug":
            raise KeyError("a slip of ours")
        if name == "huge":
            return Answer(tensors=(torch.empty(1, dtype=torch.float64),))
        return Answer(tensors=question.tensors)

    async def stream_closed(self, peer: PeerId, stream: int) -> None:
        self.closed.append((peer, stream))
        self.ended.set()


@pytest.fixture
async def swarm() -> AsyncIterator[FakeSwarm]:
    async with asyncio.timeout(20), fake_swarm() as swarm:
        yield swarm


@pytest.fixture
async def echo(swarm: FakeSwarm) -> Echo:
    echo = Echo()
    await swarm.join("bob").serve_stream("info", CallServer(HELLO, echo, Traffic()).serve)
    return echo


async def dial_bob(swarm: FakeSwarm, name: str = "ann") -> Caller:
    return await dial(swarm.join(name), BOB, "info", HELLO(), Traffic())


async def raw_stream(swarm: FakeSwarm, *, greet: bool = True) -> ByteStream:
    stream = await swarm.join("mallory").open_stream(BOB, "info")
    if greet:
        await write_frame(stream.writer, Frame(request=0, kind="hello", body=to_body(HELLO())))
        await read_frame(stream.reader)
    return stream


def named(session: str) -> CloseSession:
    return CloseSession(session=session)


async def test_many_questions_are_answered_out_of_order_on_one_stream(swarm: FakeSwarm, echo: Echo) -> None:
    caller = await dial_bob(swarm)
    slow = asyncio.create_task(caller.call(named("wait"), [torch.ones(1)], seconds=10))
    tensors = [torch.full((3,), float(i)) for i in range(300)]
    answers = await asyncio.gather(*(caller.call(named("x"), [t], seconds=10) for t in tensors))
    assert all(torch.equal(answer.tensors[0], t) for answer, t in zip(answers, tensors, strict=True))
    assert not slow.done()
    echo.go.set()
    assert torch.equal((await slow).tensors[0], torch.ones(1))
    assert caller.theirs == HELLO()
    await caller.close()


async def test_errors_become_refusals_and_the_stream_lives_on(swarm: FakeSwarm, echo: Echo) -> None:
    caller = await dial_bob(swarm)
    for session, code in (("bad", RefusalCode.SESSION), ("bug", RefusalCode.INTERNAL), ("huge", RefusalCode.MALFORMED)):
        with pytest.raises(Refused) as refused:
            await caller.call(named(session), seconds=10)
        assert refused.value.code == code
        assert "slip" not in str(refused.value)
    with pytest.raises(Refused, match="not finite"):
        await caller.call(AskInfo(), [torch.tensor([float("nan")])], seconds=10)
    assert (await caller.call(AskInfo(), seconds=10)).tensors == ()
    await caller.close()


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        (replace(HELLO(), run="run-2"), ["run-1", "run-2"]),
        (
            replace(HELLO(), low=7, high=9, software="swarmtune 9"),
            [f"{PROTOCOL_MIN} to {PROTOCOL_MAX}", "swarmtune 1", "7 to 9", "swarmtune 9"],
        ),
    ],
    ids=["another run", "no common version"],
)
async def test_strangers_are_refused_and_told_why(swarm: FakeSwarm, echo: Echo, ours: Hello, words: list[str]) -> None:
    with pytest.raises(Refused) as refused:
        await dial(swarm.join("ann"), BOB, "info", ours, Traffic())
    assert all(word in str(refused.value) for word in words)
    await echo.ended.wait()
    assert echo.closed == [("ann", 1)]
    assert echo.asked == []


async def test_an_answerer_of_another_run_is_refused_with_that_code(swarm: FakeSwarm) -> None:
    async def lie(stream: ByteStream) -> None:
        await read_frame(stream.reader)
        other = replace(HELLO(), run="run-2")
        await write_frame(stream.writer, Frame(request=0, kind="hello", body=to_body(other)))

    await swarm.join("bob").serve_stream("info", lie)
    with pytest.raises(Refused) as refused:
        await dial_bob(swarm)
    assert refused.value.code == RefusalCode.RUN


async def test_silence_instead_of_a_hello_is_ended_on_both_sides(
    swarm: FakeSwarm, echo: Echo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "HELLO_SECONDS", 0.05)
    monkeypatch.setattr(calls, "HELLO_SECONDS", 0.05)
    silent = await raw_stream(swarm, greet=False)
    assert (await read_frame(silent.reader)).body["reason"] == "no hello came in time"
    with pytest.raises(StreamClosed):
        await read_frame(silent.reader)
    swarm.find(BOB).stall()
    with pytest.raises(NetworkFailed, match="did not answer the hello"):
        await dial_bob(swarm)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack(">I", 1 << 30),
        struct.pack(">I", 2) + b"\x91\x01",
        b"\xff" * 100,
    ],
    ids=str,
)
@pytest.mark.parametrize("greeted", [True, False])
async def test_a_broken_stream_ends_and_others_go_on(swarm: FakeSwarm, echo: Echo, data: bytes, greeted: bool) -> None:
    honest = await dial_bob(swarm)
    stream = await raw_stream(swarm, greet=greeted)
    stream.writer.write(data)
    stream.writer.write_eof()
    refusal = await read_frame(stream.reader)
    assert refusal.kind == "refusal"
    with pytest.raises(StreamClosed):
        await read_frame(stream.reader)
    await echo.ended.wait()
    assert echo.closed == [("mallory", 2)]
    await honest.call(AskInfo(), seconds=10)
    assert swarm.find(BOB).failures == []
    await honest.close()


@given(st.lists(st.binary(max_size=60), max_size=4))
def test_random_bytes_after_the_hello_never_escape_the_server(chunks: list[bytes]) -> None:
    async def go() -> None:
        async with asyncio.timeout(20), fake_swarm() as swarm:
            echo = Echo()
            await swarm.join("bob").serve_stream("info", CallServer(HELLO, echo, Traffic()).serve)
            stream = await raw_stream(swarm)
            for chunk in chunks:
                stream.writer.write(struct.pack(">I", len(chunk)) + chunk)
            stream.writer.close()
            await echo.ended.wait()
            assert swarm.find(BOB).failures == []
            caller = await dial_bob(swarm)
            await caller.call(AskInfo(), seconds=10)
            await caller.close()

    asyncio.run(go())


async def test_unknown_kinds_are_refused_without_growing_the_counters(swarm: FakeSwarm) -> None:
    traffic = Traffic()
    await swarm.join("bob").serve_stream("info", CallServer(HELLO, Echo(), traffic).serve)
    stream = await raw_stream(swarm)
    for i in range(20):
        await write_frame(stream.writer, Frame(request=i, kind=f"kind\n{i}", body={}))
        assert "\n" not in str((await read_frame(stream.reader)).body["reason"])
    assert set(traffic.by_kind) == {"hello", "malformed"}


async def test_a_gone_asker_frees_what_was_kept_once(swarm: FakeSwarm, echo: Echo) -> None:
    caller = await dial_bob(swarm)
    asked = [asyncio.create_task(caller.call(named("wait"), seconds=10)) for _ in range(3)]
    await echo.waiting.wait()
    swarm.kill("ann")
    await echo.ended.wait()
    assert echo.closed == [("ann", 1)]
    assert set(echo.cancelled) == {"wait"}
    assert all(isinstance(error, StreamClosed) for error in await asyncio.gather(*asked, return_exceptions=True))
    assert caller.is_closed
    with pytest.raises(StreamClosed):
        await caller.call(AskInfo(), seconds=10)
    await caller.close()


async def test_a_dead_answerer_fails_every_question(swarm: FakeSwarm, echo: Echo) -> None:
    caller = await dial_bob(swarm)
    asked = [asyncio.create_task(caller.call(named("wait"), seconds=10)) for _ in range(3)]
    await echo.waiting.wait()
    swarm.kill("bob")
    assert all(isinstance(error, StreamClosed) for error in await asyncio.gather(*asked, return_exceptions=True))
    await caller.close()


async def test_a_late_answer_is_ignored_and_the_stream_goes_on(swarm: FakeSwarm, echo: Echo) -> None:
    caller = await dial_bob(swarm)
    with pytest.raises(TimeoutError):
        await caller.call(named("wait"), [torch.zeros(2)], seconds=0.05)
    echo.go.set()
    answer = await caller.call(named("x"), [torch.ones(2)], seconds=10)
    assert torch.equal(answer.tensors[0], torch.ones(2))
    await caller.close()


async def test_a_question_cut_off_in_writing_closes_the_stream(swarm: FakeSwarm, echo: Echo) -> None:
    caller = await dial_bob(swarm)
    swarm.find(BOB).stall()
    big = torch.zeros(4 << 20)
    first = asyncio.create_task(caller.call(named("a"), [big], seconds=0.05))
    second = asyncio.create_task(caller.call(named("b"), seconds=10))
    assert isinstance((await asyncio.gather(first, return_exceptions=True))[0], TimeoutError)
    with pytest.raises(StreamClosed):  # and not: its bytes in the middle of the first one's tensor
        await second
    assert caller.is_closed
    await caller.close()


async def test_a_question_that_is_given_up_in_writing_leaves_the_stream_to_others(swarm: FakeSwarm, echo: Echo) -> None:
    caller = await dial_bob(swarm)
    for _ in range(3):
        given_up = asyncio.create_task(caller.call(named("a"), [torch.zeros(4 << 20)], seconds=10))
        for _ in range(8):  # its first bytes are out
            await asyncio.sleep(0)
        assert caller._lock.locked()
        given_up.cancel()
        assert isinstance((await asyncio.gather(given_up, return_exceptions=True))[0], asyncio.CancelledError)
        answer = await caller.call(named("b"), [torch.ones(2)], seconds=10)
        assert torch.equal(answer.tensors[0], torch.ones(2))
    assert not caller.is_closed
    await caller.close()


async def test_one_slow_reader_does_not_hold_up_others(swarm: FakeSwarm, echo: Echo) -> None:
    slow = await raw_stream(swarm)
    big = torch.zeros(1 << 20)
    for i in range(2):
        await write_frame(slow.writer, Frame(request=i, kind="close", body={"session": "x"}, tensors=(big,)))
    caller = await dial_bob(swarm)
    for _ in range(5):
        await caller.call(AskInfo(), seconds=10)
    await caller.close()


async def test_questions_in_flight_are_bounded_by_their_bytes(
    swarm: FakeSwarm, echo: Echo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "MAX_IN_FLIGHT_BYTES", 1000)
    caller = await dial_bob(swarm)
    asked = [asyncio.create_task(caller.call(named("wait"), [torch.zeros(100)], seconds=10)) for _ in range(9)]
    await echo.waiting.wait()
    other = await dial_bob(swarm, "carl")
    await other.call(AskInfo(), seconds=10)
    assert echo.asked.count("wait") == 3
    echo.go.set()
    await asyncio.gather(*asked)
    await caller.close()
    await other.close()


async def test_the_pool_dials_once_again_after_a_death_and_says_who_is_lost(swarm: FakeSwarm, echo: Echo) -> None:
    pool = Pool(swarm.join("ann"), HELLO, Traffic(), {})
    await asyncio.gather(*(pool.call(BOB, "info", AskInfo(), seconds=10) for _ in range(20)))
    assert len(swarm.find(BOB).handlers) == 1
    swarm.kill("bob")
    with pytest.raises(PeerLost, match="bob"):
        await pool.call(BOB, "info", AskInfo(), seconds=10)
    await swarm.join("bob").serve_stream("info", CallServer(HELLO, echo, Traffic()).serve)
    await pool.call(BOB, "info", AskInfo(), seconds=10)
    with pytest.raises(PeerLost, match="did not answer a 'close' in 0 s") as caught:
        await pool.call(BOB, "info", named("wait"), seconds=0.05)
    met("did not answer a '…' in", caught.value)
    await pool.close()


async def test_the_deadline_of_a_call_covers_the_dialling(swarm: FakeSwarm, echo: Echo) -> None:
    swarm.find(BOB).stall()
    pool = Pool(swarm.join("ann"), HELLO, Traffic(), {"info": echo})
    with pytest.raises(PeerLost):
        await pool.call(BOB, "info", AskInfo(), seconds=0.05)
    with pytest.raises(PeerLost):
        await pool.call(PeerId("ann"), "info", named("wait"), seconds=0.05)
    with pytest.raises(Refused) as refused:
        await pool.call(PeerId("ann"), "info", named("bad"), seconds=10)
    assert refused.value.code == RefusalCode.SESSION
    await pool.close()


async def test_an_answer_that_makes_no_sense_is_a_bad_message(swarm: FakeSwarm) -> None:
    async def lie(stream: ByteStream) -> None:
        await read_frame(stream.reader)
        await write_frame(stream.writer, Frame(request=0, kind="hello", body=to_body(HELLO())))
        question = await read_frame(stream.reader)
        nan = (torch.tensor([float("inf")]),)
        await write_frame(stream.writer, Frame(request=99, kind="done", body={}))
        await write_frame(stream.writer, Frame(request=question.request, kind="done", body={}, tensors=nan))
        await read_frame(stream.reader)

    await swarm.join("bob").serve_stream("info", lie)
    caller = await dial_bob(swarm)
    with pytest.raises(BadMessage, match="not finite"):
        await caller.call(AskInfo(), seconds=10)
    await caller.close()
