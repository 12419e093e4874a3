"""Groups of a large run bring whole values, on whatever state: the weighted mean of what is trained comes out."""

from __future__ import annotations

import asyncio
import itertools

import pytest
import torch

from averaging import merge, planning
from averaging.averager import Averager, RoundOutcome
from averaging.config import AveragingConfig
from averaging.exchange import Brought, Call, Version
from averaging.merging import UnitView
from averaging.recipe import CODECS, LOCALS, MERGINGS, OUTERS, Recipe
from averaging.unit_round import UnitInput
from blocks.spans import unit_of
from peers.network import PeerId
from tests.fakes_averaging import FakeExchange, FakeSwarm
from tests.unit.averaging.contributions import bring, group_of

PEERS = tuple(PeerId(name) for name in ("ann", "bob", "cat"))
UNIT = unit_of("default", 0)
SHAPES = {"q.lora_A": (2, 4), "q.lora_B": (4, 2)}  # of one size: halves that are mixed up would fit each other
SAMPLES, STEPS = (1.0, 4.0, 20.0), (1, 2, 10)
NUMBER = 9


def recipes() -> list[Recipe]:
    """Every combination that can mix."""
    found = []
    for merging, local, outer, codec in itertools.product(MERGINGS, LOCALS, OUTERS, CODECS):
        rate = 0.01 if outer == "adam" else 0.7
        try:
            recipe = Recipe(merging=merging, local=local, outer=outer, outer_learning_rate=rate, codec=codec)
        except ValueError:
            continue
        if recipe.can_mix:
            found.append(recipe)
    return found


def values(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def given(place: int, number: int, recipe: Recipe) -> UnitInput:
    """One peer's unit on a state of its own; A is the seed's where it is never trained."""
    live, anchor = values(place), values(100 + place)
    if recipe.merging == "ffa":
        live["q.lora_A"] = anchor["q.lora_A"] = values(0)["q.lora_A"]
    elif recipe.merging == "rolora":
        half = "q.lora_A" if number % 2 == 0 else "q.lora_B"
        live[half] = anchor[half] = values(0)[half]
    return UnitInput(view=UnitView(unit=UNIT, round=number, live=live, anchor=anchor, outer={}, scaling=1.0))


async def play(recipe: Recipe, numbers: tuple[int, ...]) -> list[RoundOutcome]:
    """One mixing round of three, whose units are of the rounds `numbers`."""
    swarm = FakeSwarm(peers=PEERS)

    async def one(place: int) -> RoundOutcome:
        async def read():
            return {UNIT: given(place, numbers[place], recipe)}

        averager = Averager(FakeExchange(swarm, PEERS[place]), PEERS[place], "layout", AveragingConfig(recipe=recipe))
        version = Version(number=numbers[place], weight=float(place), digest=bytes([place]) * 8)
        units = {UNIT: Brought(samples=SAMPLES[place], steps=STEPS[place], version=version)}
        call = Call(begin_at=0.0, window=1.0, deadline=9.0, expected=3, label="01", is_mixing=True)
        return await averager.run_round(NUMBER, call, units, read)

    async with asyncio.timeout(20):
        return list(await asyncio.gather(*[one(place) for place in range(3)]))


@pytest.mark.parametrize(
    "recipe", [one for one in recipes() if one.codec == "fp32"], ids=lambda one: f"{one.merging}-{one.local}"
)
async def test_whole_values_become_their_weighted_mean_under_every_recipe_that_can_mix(recipe):
    outcomes = await play(recipe, (4, 4, 4))
    lives = [given(place, 4, recipe).view.live for place in range(3)]
    for outcome in outcomes:
        assert not outcome.kept
        for name, tensor in outcome.applied[UNIT].tensors.items():
            assert torch.equal(tensor, outcomes[0].applied[UNIT].tensors[name])
            expected = merge.weighted_mean([live[name] for live in lives], SAMPLES)
            torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-6)


def test_rules_whose_shares_do_not_sum_to_one_and_codecs_that_keep_too_little_of_a_value_cannot_mix():
    can = recipes()
    assert {recipe.local for recipe in can} == {"fedavg", "fedprox"}
    assert {recipe.codec for recipe in can} == {"fp32", "fp16", "int8"}
    assert {recipe.outer for recipe in can} == {"none"}
    assert {recipe.merging for recipe in can} == {"mean", "ffa", "rolora"}
    for recipe in can:
        brought = [Brought(samples=samples, steps=steps) for samples, steps in zip(SAMPLES, STEPS, strict=True)]
        assert sum(planning.shares_of(brought, recipe)) == pytest.approx(1.0)


async def test_states_of_other_rounds_mix_but_not_with_the_half_that_the_others_do_not_train():
    mean = await play(Recipe(), (4, 4, 3))
    assert all(outcome.applied.keys() == {UNIT} for outcome in mean)
    *both, odd = await play(Recipe(merging="rolora"), (4, 4, 3))
    lives = [given(place, 4, Recipe(merging="rolora")).view.live["q.lora_B"] for place in (0, 1)]
    for outcome in both:
        found = outcome.applied[UNIT].tensors
        torch.testing.assert_close(found["q.lora_B"], merge.weighted_mean(lives, SAMPLES[:2]))
        assert torch.equal(found["q.lora_A"], values(0)["q.lora_A"])
    assert odd.stale == {UNIT}
    assert not odd.applied


def test_a_state_of_a_round_that_is_not_over_does_not_mix():
    ahead = bring("b", [0], brought={"version": Version(number=NUMBER)}, number=NUMBER)
    group = group_of(bring("a", [0], number=NUMBER), ahead, bring("c", [0], number=NUMBER))
    plan = planning.plan(group, PeerId("a"), AveragingConfig(), is_mixing=True)
    assert [entry.peer for entry in plan.left_out] == ["b"]
