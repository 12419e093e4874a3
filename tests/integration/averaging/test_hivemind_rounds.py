"""Rounds among real hivemind nodes on loopback: right to the bit, and whole or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hivemind.p2p import PeerID
from hivemind.proto import averaging_pb2
from hivemind.utils.asyncio import as_aiter

from averaging import merge
from averaging.averager import RoundOutcome
from averaging.config import AveragingConfig
from averaging.errors import RoundFailed
from averaging.hivemind_exchange import HivemindExchange
from averaging.hivemind_lost import LostPeer
from averaging.hivemind_servicer import AveragingServicer
from averaging.part_message import PartMessage
from blocks.spans import Span, UnitId, unit_of
from tests.errors_page import met
from tests.integration.averaging.round_nodes import RUN, Member, address_of, member, members

SPANS = [Span(0, 4), Span(2, 6), Span(0, 6), Span(4, 6)]


async def play(peers: list[Member], number: int, expected: int | None = None) -> list[RoundOutcome]:
    begin_at = time.time() + 0.3
    async with asyncio.timeout(60):
        return await asyncio.gather(
            *[peer.round(number, begin_at=begin_at, expected=expected or len(peers)) for peer in peers]
        )


def assert_equals_the_mean(peers: list[Member], outcomes: list[RoundOutcome], unit: UnitId) -> None:
    holders = [index for index, peer in enumerate(peers) if unit in peer.units()]
    first = outcomes[holders[0]].applied[unit].tensors
    for name, value in first.items():
        expected = merge.weighted_mean(
            [peers[index].units()[unit][name] for index in holders], [peers[index].weight for index in holders]
        )
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
        for index in holders:
            assert torch.equal(outcomes[index].applied[unit].tensors[name], value)


async def test_four_peers_with_sparse_spans_hold_the_weighted_mean_equal_to_the_bit(tmp_path):
    async with members(tmp_path, SPANS) as peers:
        for number in (1, 2):
            outcomes = await play(peers, number)
            for peer, outcome in zip(peers, outcomes, strict=True):
                assert len(outcome.peers) == 4
                assert not outcome.kept
                assert outcome.applied.keys() == peer.units().keys()
            for block in range(6):
                assert_equals_the_mean(peers, outcomes, unit_of("default", block))
            assert sum(entry.bytes_sent for entry in outcomes) == sum(entry.bytes_received for entry in outcomes) > 0


async def test_nobody_comes_and_the_round_fails_in_time_and_in_one_line(tmp_path):
    config = AveragingConfig(matchmaking_seconds=0.5, request_seconds=0.2)
    async with member(tmp_path / "key", Span(0, 2), 1.0, config=config) as peer:
        started = time.monotonic()
        with pytest.raises(RoundFailed, match="3 peers were expected") as caught:
            await peer.round(1, begin_at=time.time(), expected=3)
        met("no group of … or more formed", caught.value)
        assert time.monotonic() - started < 10


class HostileExchange(HivemindExchange):
    """Sends parts that cannot be right in its classes of three holders; is honest in others."""

    def _runner(self, group, work):
        runner = super()._runner(group, work)
        if len(work.unit_class.holders) == 3:
            encode = runner._codec.encode
            runner._codec.encode = lambda tensor: self.damage(encode, tensor)
        return runner


def too_long(encode, tensor):
    return encode(tensor) * 2


def too_short(encode, tensor):
    return encode(tensor)[:-4]


@pytest.mark.parametrize("damage", [too_long, too_short])
async def test_a_part_that_cannot_be_right_costs_its_class_the_round_and_no_other(tmp_path, damage):
    hostile = type("Hostile", (HostileExchange,), {"damage": staticmethod(damage)})
    async with members(tmp_path, SPANS[:3], [HivemindExchange, hostile, HivemindExchange]) as peers:
        ann, bob, cat = await play(peers, 1)
        hostile_peer = peers[1].network.peer_id
        for outcome in (ann, bob, cat):
            for block in (2, 3):
                assert unit_of("default", block) in outcome.kept
        assert hostile_peer in ann.missing | cat.missing
        assert any(hostile_peer in reason for reason in {**ann.kept, **cat.kept}.values())
        assert ann.applied.keys() == {unit_of("default", 0), unit_of("default", 1)}, (ann.kept, cat.kept)
        assert_equals_the_mean([peers[0], peers[2]], [ann, cat], unit_of("default", 0))
        assert_equals_the_mean([peers[1], peers[2]], [bob, cat], unit_of("default", 5))


def not_a_number(encode, tensor):
    return torch.full_like(tensor, torch.nan).numpy().tobytes()


def oversized(encode, tensor):
    return encode(tensor * 1e9)


class DamagedSender(HivemindExchange):
    """Damages what it gives, not what it combines."""

    def _runner(self, group, work):
        runner = super()._runner(group, work)
        encode = runner._codec.encode
        runner._encoded = lambda stretch: PartMessage(
            averaging_pb2.PART_FOR_AVERAGING,
            group_id=runner.group_id,
            values=self.damage(encode, stretch.of(runner._debts.vector)),
        )
        return runner


@pytest.mark.parametrize("damage", [not_a_number, oversized])
async def test_an_update_that_cannot_be_right_is_dropped_its_sender_named_and_the_class_averaged(tmp_path, damage):
    spans = [Span(0, 2)] * 3
    hostile = type("Hostile", (DamagedSender,), {"damage": staticmethod(damage)})
    async with members(tmp_path, spans, [HivemindExchange, hostile, HivemindExchange]) as peers:
        outcomes = await play(peers, 1)
        liar = peers[1].network.peer_id
        for outcome in outcomes:
            assert not outcome.kept
            assert liar in outcome.offenders
        clean = []
        for unit, result in outcomes[0].applied.items():
            for name, value in result.tensors.items():
                assert all(torch.equal(value, other.applied[unit].tensors[name]) for other in outcomes)
                honest = merge.weighted_mean([peers[index].units()[unit][name] for index in (0, 2)], [1.0, 3.0])
                clean.append(torch.isclose(value, honest, rtol=1e-5, atol=1e-6).flatten())
        share = torch.cat(clean).float().mean()
        assert share > 0.6, "two of three reducers are honest, and in what they combined nothing is the liar's"


class Diverged(HivemindExchange):
    """Honest, and its training is not: its whole update is beyond what any can be."""

    def _runner(self, group, work):
        return super()._runner(group, replace(work, vector=work.vector * 1e9))


async def test_a_peer_drops_its_own_update_that_cannot_be_right_from_what_it_combines(tmp_path):
    async with members(tmp_path, [Span(0, 2)] * 3, [HivemindExchange, Diverged, HivemindExchange]) as peers:
        outcomes = await play(peers, 1)
        for outcome in outcomes:
            assert outcome.offenders == {peers[1].network.peer_id}
            assert outcome.applied.keys() == peers[0].units().keys()
            for unit, result in outcome.applied.items():
                for name, value in result.tensors.items():
                    honest = merge.weighted_mean([peers[index].units()[unit][name] for index in (0, 2)], [1.0, 3.0])
                    torch.testing.assert_close(value, honest, rtol=1e-5, atol=1e-6)


@contextlib.asynccontextmanager
async def dying_peer(key: Path, address: str, span: Span, parts_left: int):
    """A process that kills itself after `parts_left` parts."""
    script = Path(__file__).with_name("round_nodes.py")
    root = Path(__file__).parents[3]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-W",
        "ignore",
        str(script),
        str(key),
        address,
        str(span.start),
        str(span.end),
        str(parts_left),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    try:
        async with asyncio.timeout(60):
            assert await process.stdout.readline() == b"ready\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def kill_one_in_the_all_reduce(directory: Path, parts_left: int) -> None:
    async with members(directory, SPANS[:3]) as peers:
        address = await address_of(peers[0])
        async with dying_peer(directory / "dying", address, SPANS[3], parts_left) as process:
            begin_at = time.time() + 0.3
            process.stdin.write(f"{begin_at}\n".encode())
            async with asyncio.timeout(60):
                outcomes = await asyncio.gather(*[peer.round(1, begin_at=begin_at, expected=4) for peer in peers])
                assert await process.wait() == -signal.SIGKILL
        ann, bob, cat = outcomes
        assert len(ann.peers) == 4
        for outcome in (bob, cat):  # they shared blocks 4 and 5 with the dead peer: the old values stay
            assert outcome.kept.keys() == {unit_of("default", 4), unit_of("default", 5)}
        assert not ann.kept
        for block in range(4):
            assert_equals_the_mean(peers, outcomes, unit_of("default", block))
        after = await play(peers, 2)
        assert all(not outcome.kept for outcome in after)
        for block in range(6):
            assert_equals_the_mean(peers, after, unit_of("default", block))


async def test_kill_9_in_the_all_reduce_leaves_no_mixture_and_the_next_round_succeeds(tmp_path):
    # It encodes about 4 parts for each of 2 others and 4 sums: it dies with some of them out.
    await kill_one_in_the_all_reduce(tmp_path, random.Random(7).randrange(1, 9))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
async def test_kill_9_at_any_part_leaves_no_mixture(tmp_path, seed):
    await kill_one_in_the_all_reduce(tmp_path, random.Random(seed).randrange(12))


async def test_a_stranger_and_a_second_stream_are_sent_away_and_the_round_goes_on(tmp_path):
    async with members(tmp_path, [*SPANS[:2], Span(0, 6)]) as peers:
        stranger = peers[2]
        stub = AveragingServicer.get_stub(
            stranger.network.p2p, PeerID.from_base58(peers[0].network.peer_id), namespace=RUN
        )
        seen = asyncio.get_running_loop().create_future()
        runners = peers[0].exchange._runners
        put = runners.put
        runners.put = lambda key, runner: (put(key, runner), seen.done() or seen.set_result(key))

        async def intrude() -> int:
            request = PartMessage(99, group_id=await seen)
            answers = await stub.rpc_aggregate_part(as_aiter(request))
            try:
                return (await anext(answers)).code
            finally:
                await answers.aclose()  # who is sent away would else be read on from for `stall_seconds`

        async with asyncio.timeout(60):
            outcomes, answer = await asyncio.gather(play(peers[:2], 1), intrude())
        assert answer == averaging_pb2.PROTOCOL_VIOLATION
        assert not any(outcome.kept for outcome in outcomes)
        assert_equals_the_mean(peers[:2], outcomes, unit_of("default", 3))


class Confused(HivemindExchange):
    """Answers all parts with a code that no version knows; not before, or its leaving would be what the other sees."""

    def _runner(self, group, work):
        runner = super()._runner(group, work)

        async def answers(stream, sender_index):
            async for _ in stream:
                pass
            yield PartMessage(99, culprit=b"\xff" * 64)
            # It has thrown away what it would sum, and would wait for that until the round's deadline.
            runner.tensor_part_reducer.fail(LostPeer(runner.peer_id, "is confused"))

        runner._answers = answers
        return runner


async def test_an_answer_that_nobody_understands_costs_the_class_the_round(tmp_path):
    async with members(tmp_path, SPANS[:2], [HivemindExchange, Confused]) as peers:
        ann, _ = await play(peers, 1)
        assert "code 99" in ann.kept[unit_of("default", 2)]
        assert ann.missing == {peers[1].network.peer_id}
        assert unit_of("default", 0) in ann.applied
