"""What a holder's tensors are when another holder's newer state takes the place of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from averaging.recipe import Recipe
from averaging.unit_round import UnitResult, UnitRules
from blocks.adapters import LoraSettings, unit_digest
from blocks.errors import BadAdapter
from blocks.spans import UnitId
from blocks.training.ledger import Counted
from blocks.training.local_rules import LocalRule
from blocks.training.optimizer import OptimizerConfig
from blocks.training.unit_steps import DueStep, UnitSteps
from blocks.unit_state import UnitState
from swarm.own_loops.steps import OwnSteps
from swarm.units.book import RoundResult, UnitBook

UNITS = [UnitId("default/block.0"), UnitId("default/block.1")]
SHAPES = {"q.lora_A": (2, 3), "q.lora_B": (3, 2)}


def holder() -> tuple[UnitBook, dict[UnitId, dict[str, nn.Parameter]]]:
    parameters = {unit: {name: nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()} for unit in UNITS}
    steps = OwnSteps(parameters, LocalRule(), Recipe())
    book = UnitBook(parameters, LoraSettings(rank=2, seed=1), steps, UnitRules(Recipe()))
    book.begin()
    book.take(dict(book.states))
    return book, parameters


def newer(unit: UnitId) -> UnitState:
    tensors = {name: torch.full(shape, 5.0) for name, shape in SHAPES.items()}
    return UnitState(unit=unit, round=2, weight=4.0, total_samples=9, digest=unit_digest(tensors), tensors=tensors)


def test_work_that_stays_is_the_change_that_the_next_round_reads() -> None:
    book, parameters = holder()
    with torch.no_grad():
        for named in parameters.values():
            for parameter in named.values():
                parameter.add_(0.25)
    book.take({unit: newer(unit) for unit in UNITS}, staying={UNITS[0]})
    inputs = book.inputs()
    for unit, change in zip(UNITS, (0.25, 0.0), strict=True):
        view = inputs[unit].view
        assert book.states[unit].version == newer(unit).version
        for name, shape in SHAPES.items():
            assert torch.equal(view.anchor[name], newer(unit).tensors[name])
            assert torch.allclose(view.live[name] - view.anchor[name], torch.full(shape, change), atol=1e-6)


def test_what_does_not_fit_changes_nothing_of_what_was_trained() -> None:
    book, parameters = holder()
    before = {name: each.detach().clone() for name, each in parameters[UNITS[0]].items()}
    bad = replace(newer(UNITS[1]), tensors={"q.lora_A": torch.ones(9, 9), "q.lora_B": torch.ones(3, 2)})
    with pytest.raises(BadAdapter):
        book.take({UNITS[0]: newer(UNITS[0]), UNITS[1]: bad}, staying=UNITS)
    assert all(torch.equal(each, before[name]) for name, each in parameters[UNITS[0]].items())
    assert book.states[UNITS[0]].round == 0


@pytest.mark.parametrize("moments", ["own", "mean"])
def test_moments_go_through_a_round_where_its_rules_average_them(moments: str) -> None:
    parameters = {unit: {name: nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()} for unit in UNITS}
    steps, rules = UnitSteps(parameters, OptimizerConfig()), UnitRules(Recipe(moments=moments))
    book = UnitBook(parameters, LoraSettings(rank=2, seed=1), steps, rules)
    book.begin()
    for unit in UNITS:
        steps.add({unit: {name: torch.ones(shape) for name, shape in SHAPES.items()}})
        steps.step([DueStep(unit=unit, tokens=1, samples=0)])
    read = book.inputs()
    kinds = {f"{name}/{kind}" for name in SHAPES for kind in ("mean", "rms")} if moments == "mean" else set()
    assert all(given.moments.keys() == kinds for given in read.values())
    tensors = newer(UNITS[0]).tensors
    others = {key: torch.full_like(tensor, 3.0) for key, tensor in read[UNITS[0]].moments.items()}
    applied = {UNITS[0]: UnitResult(tensors=tensors, merged=tensors, outer={}, moments=others)}
    counted = {UNITS[0]: Counted()}
    book.apply(RoundResult(number=1, applied=applied, samples={UNITS[0]: 4.0}, counted=counted))
    assert not book.states[UNITS[0]].outer
    for unit, expected in zip(UNITS, (3.0 if moments == "mean" else 1.0, 1.0), strict=True):
        for tensor in steps.estimates(unit).values():
            torch.testing.assert_close(tensor, torch.full_like(tensor, expected))
