"""Rounds by other recipes than the plain mean, among real hivemind nodes: codecs, two passes, robust means."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest
import torch

from averaging import merge
from averaging.averager import RoundOutcome
from averaging.hivemind_exchange import HivemindExchange
from averaging.recipe import CODECS, Recipe
from averaging.unit_round import UnitInput, UnitRules
from blocks.spans import Span, UnitId, unit_of
from peers.config import NetworkConfig
from peers.streams.send_limit import BURST_SECONDS, SendLimit
from tests.integration.averaging.round_nodes import CONFIG, Member, address_of, member, members
from tests.link import LOOPBACK, Link, free_port

UNIT = unit_of("default", 0)
TOLERANCE = {"fp32": 1e-6, "fp16": 1e-3, "int8": 0.02, "int4": 0.2}  # of the largest value


async def play(peers: list[Member], number: int) -> list[RoundOutcome]:
    begin_at = time.time() + 0.3
    async with asyncio.timeout(60):
        return await asyncio.gather(*[peer.round(number, begin_at=begin_at, expected=len(peers)) for peer in peers])


def mean_of(peers: list[Member], unit: UnitId, name: str) -> torch.Tensor:
    return merge.weighted_mean([peer.units()[unit][name] for peer in peers], [peer.weight for peer in peers])


def assert_equal_to_the_bit(outcomes: list[RoundOutcome]) -> None:
    for unit, result in outcomes[0].applied.items():
        for name, value in result.tensors.items():
            assert all(torch.equal(value, other.applied[unit].tensors[name]) for other in outcomes)


@pytest.mark.parametrize(("codec", "lossless"), [*((codec, False) for codec in CODECS), ("fp32", True), ("int8", True)])
async def test_every_codec_averages_on_real_peers_and_leaves_them_equal_to_the_bit(tmp_path, codec, lossless):
    config = replace(CONFIG, recipe=Recipe(codec=codec, lossless=lossless, top_share=0.1))
    async with members(tmp_path, [Span(0, 2)] * 2, config=config) as peers:
        outcomes = await play(peers, 1)
        assert all(not outcome.kept for outcome in outcomes)
        assert_equal_to_the_bit(outcomes)
        exact = torch.cat([mean_of(peers, UNIT, name).flatten() for name in ("A", "B")])
        found = torch.cat([outcomes[0].applied[UNIT].tensors[name].flatten() for name in ("A", "B")])
        if codec == "topk":
            states = [result.tensors for result in outcomes[0].applied.values()]
            everything = torch.cat([tensor.flatten() for tensors in states for tensor in tensors.values()])
            num_found, share = int((everything != 0).sum()), len(everything) // 10
            most_parts = 2 * 3  # of two reducers; each part rounds its share up, to one value more at most
            assert 0.8 * share < num_found <= share + most_parts, "what is not among the largest comes later"
            assert torch.nn.functional.cosine_similarity(found, exact, dim=0) > 0.4
        else:
            assert float((found - exact).abs().max() / exact.abs().max()) < TOLERANCE[codec]
        assert sum(entry.bytes_sent for entry in outcomes) == sum(entry.bytes_received for entry in outcomes)


async def test_what_a_codec_keeps_back_comes_in_later_rounds(tmp_path):
    config = replace(CONFIG, recipe=Recipe(codec="topk", top_share=0.2))
    async with members(tmp_path, [Span(0, 1)] * 2, config=config) as peers:
        exact = torch.cat([mean_of(peers, UNIT, name).flatten() for name in ("A", "B")])
        total = torch.zeros_like(exact)
        errors = []
        for number in range(
            1, 9
        ):  # the same change each time: what arrives in all should be the change times the rounds
            outcomes = await play(peers, number)
            total += torch.cat([outcomes[0].applied[UNIT].tensors[name].flatten() for name in ("A", "B")])
            errors.append(float((total / number - exact).norm() / exact.norm()))
        assert errors[-1] < 0.25
        assert errors[-1] < errors[0] / 2


async def test_eight_bits_send_about_a_quarter_of_the_bytes(tmp_path):
    sent = {}
    for codec in ("fp32", "int8"):
        config = replace(CONFIG, recipe=Recipe(codec=codec))
        directory = tmp_path / codec
        directory.mkdir()
        async with members(directory, [Span(0, 3)] * 2, config=config) as peers:
            sent[codec] = sum(outcome.bytes_sent for outcome in await play(peers, 1))
    assert sent["int8"] <= 0.27 * sent["fp32"]


class Rotated(Member):
    """A member that holds the same product as all others, of factors that are turned its own way."""

    def units(self) -> dict[UnitId, dict[str, torch.Tensor]]:
        shared = torch.Generator().manual_seed(99)
        a_RI, b_OR = torch.randn(4, 300, generator=shared), torch.randn(200, 4, generator=shared)
        own = torch.Generator().manual_seed(int(self.weight))
        turn_RR = torch.linalg.qr(torch.randn(4, 4, generator=own)).Q
        return {UNIT: {"q.lora_A": turn_RR @ a_RI, "q.lora_B": b_OR @ turn_RR.T}}

    def inputs(self) -> dict[UnitId, UnitInput]:
        found = super().inputs()
        start = {name: torch.zeros(t.shape) for name, t in self.units()[UNIT].items()}
        return {unit: replace(given, view=replace(given.view, anchor=start)) for unit, given in found.items()}


def product(tensors) -> torch.Tensor:
    return tensors["q.lora_B"].double() @ tensors["q.lora_A"].double()


async def test_power_merges_the_products_in_two_passes_where_the_mean_of_the_factors_is_something_else(tmp_path):
    errors = {}
    for merging in ("mean", "power"):
        config = replace(CONFIG, recipe=Recipe(merging=merging))
        directory = tmp_path / merging
        directory.mkdir()
        async with members(directory, [Span(0, 1)] * 3, config=config, kind=Rotated) as peers:
            for peer in peers:
                peer.use(UnitRules(config.recipe, seed=3, rank=4))
            outcomes = await play(peers, 1)
            assert all(not outcome.kept for outcome in outcomes)
            assert_equal_to_the_bit(outcomes)
            weights = [peer.weight for peer in peers]
            best = merge.weighted_mean([product(peer.units()[UNIT]).float() for peer in peers], weights)
            found = product(outcomes[0].applied[UNIT].tensors)
            errors[merging] = float((found - best).norm() / best.norm())
            assert outcomes[0].merging_error == pytest.approx(errors[merging], rel=0.9, abs=0.02)
            assert all(outcome.merging_error == outcomes[0].merging_error for outcome in outcomes)
    assert errors["power"] < 1e-5
    assert errors["mean"] > 0.3


class LyingReducer(HivemindExchange):
    """Combines what it is given into its opposite."""

    def _runner(self, group, work):
        runner = super()._runner(group, work)
        combine = runner.tensor_part_reducer._combine
        runner.tensor_part_reducer._combine = lambda index, pieces: -combine(index, pieces)
        return runner


class Alike(Member):
    """A member whose changes are mostly those of all others, as in a swarm that learns one thing."""

    def units(self) -> dict[UnitId, dict[str, torch.Tensor]]:
        own = super().units()
        shared = torch.Generator().manual_seed(5)
        return {
            unit: {name: torch.randn(t.shape, generator=shared) + 0.5 * t for name, t in tensors.items()}
            for unit, tensors in own.items()
        }


async def test_a_reducer_that_lies_is_found_its_sums_are_not_applied_and_the_next_round_goes_without_it(tmp_path):
    config = replace(CONFIG, recipe=Recipe(robust="trimmed", weighting="equal"))
    types = [HivemindExchange] * 4 + [LyingReducer]
    async with members(tmp_path, [Span(0, 1)] * 5, types, config=config, kind=Alike) as peers:
        liar = peers[4].network.peer_id
        for outcome in await play(peers, 1):
            assert outcome.kept.keys() == {UNIT}
            assert "out of line" in outcome.kept[UNIT]
            assert outcome.offenders == {liar}
        for peer in peers[:4]:
            peer.distrusts = frozenset({liar})
        *honest, outcast = await play(peers, 2)
        assert "distrust" in outcast.kept[UNIT]
        assert_equal_to_the_bit(honest)
        for name, value in honest[0].applied[UNIT].tensors.items():
            middle = torch.stack([peer.units()[UNIT][name] for peer in peers[:4]]).sort(dim=0).values[1:3].mean(dim=0)
            assert (value - middle).norm() < 0.1 * middle.norm(), "the trimmed mean, save that long updates are clipped"


async def test_the_bytes_that_a_round_counts_are_those_that_the_wire_carried(tmp_path):
    port = free_port()
    link = Link(port)
    outside = await link.start()
    try:
        near = NetworkConfig(host=LOOPBACK, port=port, announce=(f"/ip4/{LOOPBACK}/tcp/{outside}",))
        async with (
            member(tmp_path / "near", Span(0, 30), 1.0, network_config=near) as ann,
            member(tmp_path / "far", Span(0, 30), 2.0, initial_peers=[await address_of(ann)]) as bob,
        ):
            before = link.count()
            ann_done, bob_done = await play([ann, bob], 1)
            after = link.count()
        there, back = after.there_bytes - before.there_bytes, after.back_bytes - before.back_bytes
        # What comes on top: encryption and multiplexing, the matchmaking, the votes and the DHT's own talk.
        assert ann_done.bytes_sent <= back <= 1.05 * ann_done.bytes_sent + 50_000
        assert bob_done.bytes_sent <= there <= 1.05 * bob_done.bytes_sent + 50_000
        assert ann_done.bytes_received == bob_done.bytes_sent > 2_000_000
        assert bob_done.bytes_received == ann_done.bytes_sent
    finally:
        await link.close()


async def test_a_send_limit_holds_back_the_all_reduce_and_the_round_is_right(tmp_path):
    rate = 400_000  # bytes per second; parts follow it, so that none is silent for long
    limited = type("Limited", (HivemindExchange,), {"__init__": lambda self, *args: _limit(self, rate, *args)})
    async with members(tmp_path, [Span(0, 3)] * 2, [HivemindExchange, limited]) as peers:
        began = time.monotonic()
        outcomes = await play(peers, 1)
        seconds = time.monotonic() - began
        assert not any(outcome.kept for outcome in outcomes)
        assert_equal_to_the_bit(outcomes)
        exact, found = mean_of(peers, UNIT, "A"), outcomes[0].applied[UNIT].tensors["A"]
        assert torch.allclose(found, exact, rtol=1e-5, atol=1e-6)
        assert seconds >= outcomes[1].bytes_sent / rate - BURST_SECONDS - 1.0  # the first message goes in debt


def _limit(exchange, rate, *args):
    HivemindExchange.__init__(exchange, *args, SendLimit(rate))
