"""A loop's own optimizer under the run's rules: gradients are changed before a step as a host would change them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from averaging.recipe import Recipe
from blocks.spans import UnitId
from blocks.training.local_rules import LocalRule
from swarm.errors import BadConfig
from swarm.own_loops.counting import Counter
from swarm.own_loops.steps import OwnSteps

UNIT = UnitId("default/block.0")


def steps_of(rule: LocalRule, **recipe: str) -> tuple[OwnSteps, dict[str, nn.Parameter]]:
    named = {"q.lora_A": nn.Parameter(torch.ones(2, 3)), "q.lora_B": nn.Parameter(torch.ones(3, 2))}
    for parameter in named.values():
        parameter.grad = torch.full_like(parameter, 0.5)
    return OwnSteps({UNIT: named}, rule, Recipe(**recipe)), named  # type: ignore[arg-type]


def test_fedprox_pulls_towards_the_last_round() -> None:
    steps, named = steps_of(LocalRule(proximal=0.1), local="fedprox")
    steps.terms[UNIT].begin({name: torch.zeros_like(each) for name, each in named.items()})
    steps.adjust()
    assert all(torch.allclose(each.grad, torch.full_like(each, 0.6)) for each in named.values())  # type: ignore[arg-type]


def test_scaffold_adds_the_agreed_variate_and_takes_the_own_one_away() -> None:
    steps, named = steps_of(LocalRule(control=True), local="scaffold")
    ones = {name: torch.ones_like(each) for name, each in named.items()}
    steps.terms[UNIT].begin(
        ones, agreed={n: 0.2 * t for n, t in ones.items()}, own={n: 0.3 * t for n, t in ones.items()}
    )
    steps.adjust()
    assert all(torch.allclose(each.grad, torch.full_like(each, 0.4)) for each in named.values())  # type: ignore[arg-type]
    control = steps.terms[UNIT].control()
    assert all(torch.equal(control[name], torch.full_like(each, 0.5)) for name, each in named.items())


def test_tensors_that_are_frozen_in_a_round_are_not_stepped() -> None:
    steps, named = steps_of(LocalRule(), merging="ffa")
    steps.terms[UNIT].begin({}, frozen=frozenset({"q.lora_A"}))
    steps.adjust()
    assert named["q.lora_A"].grad is None
    assert torch.equal(named["q.lora_B"].grad, torch.full((3, 2), 0.5))  # type: ignore[arg-type]


def test_moments_of_an_optimizer_begin_anew_where_a_round_says_so() -> None:
    steps, named = steps_of(LocalRule())
    steps.reset_moments([UNIT])  # before there is an optimizer
    optimizer = steps.optimizer = torch.optim.AdamW(named.values())
    optimizer.step()
    assert len(optimizer.state) == 2
    steps.reset_moments([UNIT])
    assert not optimizer.state
    optimizer.step()
    assert all(float(state["step"]) == 1 for state in optimizer.state.values())


def test_moments_of_an_adam_are_read_and_written_as_a_hosts_are() -> None:
    steps, named = steps_of(LocalRule(), moments="mean")
    assert steps.estimates(UNIT) == {}
    steps.take_estimates({UNIT: {}})  # before there is an optimizer
    groups = [{"params": [named["q.lora_A"]], "betas": (0.8, 0.99)}, {"params": [named["q.lora_B"]]}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, amsgrad=True)
    steps.optimizer = optimizer
    named["q.lora_B"].grad = None
    for _ in range(3):
        optimizer.step()
    said = steps.estimates(UNIT)
    assert said.keys() == {"q.lora_A/mean", "q.lora_A/rms"}, "the other was never stepped"
    assert all(torch.allclose(tensor, torch.full((2, 3), 0.5)) for tensor in said.values())
    memory = optimizer.state[named["q.lora_A"]]["exp_avg"]
    mean = {f"{name}/{kind}": torch.full_like(each, 0.25) for name, each in named.items() for kind in ("mean", "rms")}
    steps.take_estimates({UNIT: mean})
    assert all(torch.allclose(tensor, torch.full((2, 3), 0.25)) for tensor in steps.estimates(UNIT).values())
    assert torch.allclose(memory, torch.full((2, 3), 0.25 * (1 - 0.8**3)))
    named["q.lora_B"].grad = torch.ones(3, 2)
    optimizer.step()
    assert float(optimizer.state[named["q.lora_A"]]["step"]) == 4
    assert float(optimizer.state[named["q.lora_B"]]["step"]) == 1


def test_an_optimizer_without_moments_is_refused_where_rounds_average_them() -> None:
    steps, named = steps_of(LocalRule(), moments="mean")
    with pytest.raises(BadConfig, match=r"rounds\.moments = 'mean'.*SGD has none; train with torch\.optim\.AdamW"):
        steps.check(torch.optim.SGD(named.values(), lr=0.1))
    steps.check(torch.optim.Adam(named.values(), lr=0.1))
    steps, named = steps_of(LocalRule())
    steps.check(torch.optim.SGD(named.values(), lr=0.1))


class Model(nn.Module):
    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return input_ids


def test_rows_and_labelled_tokens_are_counted_where_a_model_is_trained() -> None:
    model = Model()
    counter = Counter(model)
    ids_BT = torch.ones(3, 5, dtype=torch.long)
    labels_BT = ids_BT.clone()
    labels_BT[:, :2] = -100
    model(input_ids=ids_BT, labels=labels_BT)
    model(ids_BT)  # no labels: every token
    with torch.no_grad():
        model(input_ids=ids_BT, labels=labels_BT)
    model.eval()
    model(input_ids=ids_BT, labels=labels_BT)
    model.train()
    assert counter.take() == (6, 3 * 3 + 15)
    assert counter.take() == (0, 0)
    counter.close()
    model(input_ids=ids_BT)
    assert counter.take() == (0, 0)
