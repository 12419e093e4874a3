"""Who reduces units that it does not hold brings as many values as their holders do, and nothing to their mean."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch

from averaging import merge, planning
from averaging.averager import Averager, Link
from averaging.config import AveragingConfig
from averaging.exchange import Brought, Call, Contribution, Group, Version
from averaging.feedback import Feedback
from averaging.helping import helped_work
from averaging.merging import UnitView
from averaging.recipe import Recipe
from averaging.unit_round import UnitInput, UnitRules
from averaging.unit_work import RoundWork
from blocks.spans import unit_of
from peers.network import PeerId
from tests.fakes_averaging import FakeExchange, FakeSwarm

ANN, BOB, CAT = PeerId("ann"), PeerId("bob"), PeerId("cat")
UNITS = [unit_of("default", block) for block in (2, 3)]
SHAPES = {unit: {"q.lora_A": (2, 5), "q.lora_B": (7, 2)} for unit in UNITS}
RECIPES = [
    Recipe(),
    Recipe(merging="ffa"),
    Recipe(merging="rolora"),
    Recipe(local="scaffold"),
    Recipe(moments="mean"),
    Recipe(moments="mean", merging="ffa"),
    Recipe(outer="nesterov"),
    Recipe(codec="int8"),
]


def group_of(number: int) -> Group:
    """Bob and cat hold the units and cannot be called; ann can, and holds none of them."""
    brought = Brought(samples=2.0, version=Version(number=number))
    base = Contribution(peer=ANN, number=9, layout="same", units={unit_of("default", 0): Brought(samples=1.0)})
    behind_nat = [
        replace(base, peer=peer, units=dict.fromkeys(UNITS, brought), client_mode=True) for peer in (BOB, CAT)
    ]
    return Group(group_id=b"group", contributions=(base, *behind_nat))


def inputs(peer: PeerId, number: int) -> dict:
    generator = torch.Generator().manual_seed(ord(peer[0]))
    found = {}
    for unit in UNITS:
        live = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES[unit].items()}
        anchor = {name: torch.zeros_like(tensor) for name, tensor in live.items()}
        view = UnitView(unit=unit, round=number, live=live, anchor=anchor, outer={}, scaling=1.0)
        found[unit] = UnitInput(view=view)
    return found


@pytest.mark.parametrize("number", [3, 4])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.merging}-{recipe.local}-{recipe.outer}")
def test_a_helper_brings_zeros_of_the_holders_size_and_counts_all_holders_as_they_do(recipe, number):
    config, rules = AveragingConfig(recipe=recipe), UnitRules(recipe, shapes=SHAPES)
    group = group_of(number)
    [helped] = helped_work(group, planning.plan(group, ANN, config), rules)
    plan = planning.plan(group, BOB, config)
    [held] = RoundWork(rules, plan, inputs(BOB, number), 9).entries(Feedback())
    assert helped.unit_class == held.unit_class
    assert helped.unit_class.helpers == (ANN,)
    assert helped.vector.shape == held.vector.shape
    assert not helped.vector.any()
    assert helped.segments == held.segments


def test_units_that_the_run_does_not_have_are_refused_and_rules_of_two_passes_too(caplog):
    group = group_of(3)
    plan = planning.plan(group, ANN, AveragingConfig())
    [refused] = helped_work(group, plan, UnitRules(Recipe(), shapes={UNITS[0]: SHAPES[UNITS[0]]}))
    assert refused.vector is None
    assert f"{UNITS[1]} cannot be reduced here" in caplog.text
    [refused] = helped_work(group, plan, UnitRules(Recipe(merging="power"), shapes=SHAPES))
    assert refused.vector is None


async def test_the_helper_of_a_round_says_how_many_classes_it_helped_and_keeps_its_own_units():
    swarm = FakeSwarm(peers=(ANN, BOB, CAT))

    async def one(peer: PeerId):
        async def read():
            return inputs(peer, 0) if peer != ANN else {}

        rules = UnitRules(Recipe(), shapes=SHAPES)
        averager = Averager(FakeExchange(swarm, peer), peer, "layout", AveragingConfig(), rules=rules)
        brought = dict.fromkeys(UNITS, Brought(samples=2.0)) if peer != ANN else {}
        call = Call(begin_at=0.0, window=1.0, deadline=10.0, expected=3)
        return await averager.run_round(9, call, brought, read, link=Link(client_mode=peer != ANN))

    async with asyncio.timeout(20):
        ann, bob, cat = await asyncio.gather(*[one(peer) for peer in (ANN, BOB, CAT)])
    assert (ann.helped, bob.helped, cat.helped) == (1, 0, 0)
    assert not ann.applied
    for unit in UNITS:
        both = [inputs(peer, 0)[unit].view.live for peer in (BOB, CAT)]
        for name, tensor in bob.applied[unit].tensors.items():
            assert torch.equal(tensor, cat.applied[unit].tensors[name])
            torch.testing.assert_close(tensor, merge.weighted_mean([live[name] for live in both], [1.0, 1.0]))
