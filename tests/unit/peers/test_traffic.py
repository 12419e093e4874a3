"""Bytes of streams: every frame is counted whole, on both sides alike, and nobody can make the counts grow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import msgpack
import pytest
import torch

from peers.errors import BadMessage, Refused
from peers.info_service import InfoService
from peers.network import PeerId
from peers.streams import messages
from peers.streams.answering import CallServer
from peers.streams.calls import Answer, Question, dial, hello_maker
from peers.streams.fields import to_body
from peers.streams.messages import AskInfo, InfoReply, parse_message
from peers.streams.pool import Pool
from peers.streams.traffic import MAX_KINDS, Bytes, KindTraffic, Traffic, total
from peers.streams.wire_format import WireFormat
from tests.fakes_network import FakeSwarm, fake_swarm

HELLO = hello_maker("run-1", "swarmtune 1", clock=lambda: 5.0)
ANN, BOB = PeerId("ann"), PeerId("bob")
HIDDEN = torch.linspace(-3, 3, 2 * 5 * 64).reshape(2, 5, 64)


class Echo:
    """Gives tensors back, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Question] = []

    async def answer(self, question: Question) -> Answer:
        self.asked.append(question)
        return Answer(tensors=(HIDDEN, *question.tensors[1:]))

    async def stream_closed(self, peer: PeerId, stream: int) -> None:
        pass


@pytest.fixture
async def swarm() -> AsyncIterator[FakeSwarm]:
    async with asyncio.timeout(20), fake_swarm() as swarm:
        yield swarm


@pytest.mark.parametrize("wire", [None, *WireFormat])
async def test_both_sides_count_the_same_bytes_of_every_frame(swarm: FakeSwarm, wire: WireFormat | None) -> None:
    ours, theirs = Traffic(), Traffic()
    await swarm.join("bob").serve_stream("info", CallServer(HELLO, Echo(), theirs).serve)
    caller = await dial(swarm.join("ann"), BOB, "info", HELLO(), ours)
    await caller.call(AskInfo(), [HIDDEN], seconds=10, wire=wire)
    with pytest.raises(Refused):
        await caller.call(AskInfo(), [torch.tensor([float("nan")])], seconds=10)
    await caller.close()
    assert ours.by_kind.keys() == theirs.by_kind.keys() == {"hello", "ask"}
    for kind, count in ours.by_kind.items():
        assert (count.sent, count.received) == (theirs.by_kind[kind].received, theirs.by_kind[kind].sent)
    payload = {WireFormat.BF16: 2 * 640, WireFormat.EIGHT_BIT: 640 + 10 * 4}.get(wire or WireFormat.FP32, 4 * 640)
    assert payload < ours.by_kind["ask"].received < payload + 200
    assert ours.by_peer == {BOB: ours.by_kind}
    assert ours.total == total(ours.by_kind.values())


@pytest.mark.parametrize("wire", list(WireFormat))
async def test_the_answer_comes_in_the_format_that_was_asked_for(swarm: FakeSwarm, wire: WireFormat) -> None:
    echo = Echo()
    await swarm.join("bob").serve_stream("info", CallServer(HELLO, echo, Traffic()).serve)
    pool = Pool(swarm.join("ann"), HELLO, Traffic(), {"info": echo})
    mask = torch.tensor([[0, 1, 300]])
    there = await pool.call(BOB, "info", AskInfo(), [HIDDEN, mask], seconds=10, wire=wire)
    bare = await pool.call(BOB, "info", AskInfo(), seconds=10, wire=wire)
    own = await pool.call(ANN, "info", AskInfo(), [HIDDEN], seconds=10, wire=wire)
    sent, asked, kept = echo.asked
    for question, answer in ((sent, there), (asked, bare)):
        assert question.wire == wire
        assert answer.tensors[0].dtype == (torch.bfloat16 if wire == WireFormat.BF16 else torch.float32)
        assert torch.allclose(answer.tensors[0].float(), HIDDEN, atol=3 / 250)
        assert torch.equal(answer.tensors[0], HIDDEN) is (wire == WireFormat.FP32)
    assert torch.equal(sent.tensors[1], mask)
    assert torch.equal(there.tensors[1], mask)
    assert kept.tensors[0] is HIDDEN  # to itself a peer sends nothing
    assert own.tensors[0] is HIDDEN
    assert kept.wire == wire
    await pool.close()


async def test_what_eight_bits_cannot_hold_is_refused_here_and_the_stream_lives_on(swarm: FakeSwarm) -> None:
    await swarm.join("bob").serve_stream("info", CallServer(HELLO, Echo(), Traffic()).serve)
    caller = await dial(swarm.join("ann"), BOB, "info", HELLO(), Traffic())
    with pytest.raises(Refused, match="cannot be sent in 8 bits"):
        await caller.call(AskInfo(), [HIDDEN / 0], seconds=10, wire=WireFormat.EIGHT_BIT)
    await caller.call(AskInfo(), [HIDDEN], seconds=10, wire=WireFormat.EIGHT_BIT)
    await caller.close()


async def test_a_malformed_stream_is_counted_too(swarm: FakeSwarm) -> None:
    traffic = Traffic()
    await swarm.join("bob").serve_stream("info", CallServer(HELLO, Echo(), traffic).serve)
    stream = await swarm.join("mallory").open_stream(BOB, "info")
    stream.writer.write(b"\x00\x00\x00\x02\x91\x01")
    read = await stream.reader.read()
    assert traffic.by_kind["hello"].sent == len(read)


def test_counts_of_peers_are_bounded_and_sums_are_not_lost() -> None:
    traffic = Traffic(max_peers=3)
    for number in range(10):
        traffic.add(PeerId("regular"), "step", sent=1)
        traffic.add(PeerId(f"passing-{number}"), "step", sent=10, received=7)
    assert list(traffic.by_peer) == ["passing-8", "regular", "passing-9"]
    assert traffic.by_peer[PeerId("regular")] == {"step": Bytes(sent=10)}
    assert traffic.by_kind == {"step": Bytes(sent=110, received=70)}


async def test_info_tells_the_sums_by_kind_where_they_are_wanted(swarm: FakeSwarm) -> None:
    traffic = Traffic()
    traffic.add(ANN, "step", sent=5, received=6)
    traffic.add(BOB, "forward", received=1 << 40)
    service = InfoService(lambda: b"record", traffic, lambda: 7.0)
    await swarm.join("bob").serve_stream("info", CallServer(HELLO, service, Traffic()).serve)
    pool = Pool(swarm.join("ann"), HELLO, Traffic(), {})
    bare = InfoReply(record=b"record", unix_seconds=7.0)
    assert (await pool.call(BOB, "info", AskInfo(), seconds=5)).message == bare
    told = (KindTraffic("forward", 0, 1 << 40), KindTraffic("step", 5, 6))
    assert (await pool.call(BOB, "info", AskInfo(traffic=True), seconds=5)).message == replace(bare, traffic=told)
    await pool.close()


@pytest.mark.parametrize(
    "traffic",
    [
        None, 3, [3], [["step"]], [["step", 1, 2, 3]], [["step", -1, 2]], [["step", 1, 1 << 63]], [["step", 1.0, 2]],
        [["step", True, 2]], [["", 1, 2]], [["a\x1b[2J", 1, 2]], [["x" * 33, 1, 2]], [[3, 1, 2]],
        [["step", 1, 2]] * (MAX_KINDS + 1),
    ],
    ids=str,
)  # fmt: skip
def test_traffic_that_makes_no_sense_is_refused(traffic: object) -> None:
    body = {**to_body(InfoReply(record=b"", unix_seconds=1.0)), "traffic": traffic}
    with pytest.raises(BadMessage, match="traffic"):
        parse_message("info", msgpack.unpackb(msgpack.packb(body)))


def test_all_kinds_fit_into_one_reply() -> None:
    assert len(messages._TYPES) + 1 <= MAX_KINDS
