"""FedProx and SCAFFOLD through the steps that a host makes, against the same written with torch's own AdamW."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from blocks.spans import UnitId
from blocks.training.local_rules import LocalRule, UnitTerms
from blocks.training.optimizer import OptimizerConfig, UnitOptimizer
from blocks.training.unit_steps import DueStep, UnitSteps

UNIT, OTHER = UnitId("x/block.0"), UnitId("x/block.1")
A, B = "m.lora_A", "m.lora_B"
SHAPES = {A: (2, 5), B: (4, 2)}
TOKENS = 7
SCAFFOLD = LocalRule(control=True)


def tensors(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def parameters(seed: int = 0):
    return {name: nn.Parameter(value) for name, value in tensors(seed).items()}


def config(local: LocalRule, **changes) -> OptimizerConfig:
    return OptimizerConfig(**({"learning_rate": 0.02, "weight_decay": 0.1, "local": local} | changes))


def make_step(steps: UnitSteps, gradients, unit: UnitId = UNIT) -> None:
    """As a host does: gradients of summed losses, in two microbatches, divided by the tokens."""
    steps.add({unit: {name: 0.25 * TOKENS * one for name, one in gradients.items()}})
    steps.add({unit: {name: 0.75 * TOKENS * one for name, one in gradients.items()}})
    steps.step([DueStep(unit=unit, tokens=TOKENS, samples=0)])


class Plain:
    """The reference: torch's AdamW over parameters of its own."""

    def __init__(self, clip_norm: float = 0.0, seed: int = 0) -> None:
        self.values = parameters(seed)
        self._clip_norm = clip_norm
        self._adamw = torch.optim.AdamW(self.values.values(), lr=0.02, weight_decay=0.1)

    def step(self, gradients) -> None:
        for name, parameter in self.values.items():
            parameter.grad = None if gradients.get(name) is None else gradients[name].detach().clone()
        if self._clip_norm:
            nn.utils.clip_grad_norm_(self.values.values(), self._clip_norm)
        self._adamw.step()


def assert_close(held, plain: Plain) -> None:
    for name, parameter in held.items():
        torch.testing.assert_close(parameter.detach(), plain.values[name].detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
@pytest.mark.parametrize("proximal", [0.05, 3.0])
def test_fedprox_is_the_gradient_of_the_loss_with_its_proximal_term(proximal, clip_norm):
    held, plain = parameters(), Plain(clip_norm)
    steps = UnitSteps({UNIT: held}, config(LocalRule(proximal=proximal), clip_norm=clip_norm))
    for number in range(3):
        anchor = {name: one.detach().clone() for name, one in held.items()}
        steps.terms[UNIT].begin(anchor)
        for step in range(4):
            raw = tensors(100 * number + step)
            loss = sum((raw[name] * one).sum() for name, one in plain.values.items())
            loss = loss + proximal / 2 * sum(((one - anchor[name]) ** 2).sum() for name, one in plain.values.items())
            plain.step(dict(zip(SHAPES, torch.autograd.grad(loss, list(plain.values.values())), strict=True)))
            make_step(steps, raw)
            assert_close(held, plain)


def test_fedprox_keeps_its_own_copy_of_what_it_is_pulled_to():
    held = parameters()
    steps = UnitSteps({UNIT: held}, config(LocalRule(proximal=1.0)))
    anchor = {name: one.detach() for name, one in held.items()}  # views of what is about to move
    steps.terms[UNIT].begin(anchor)
    kept, gradients = tensors(0), tensors(1)
    make_step(steps, gradients)
    adjusted = steps.terms[UNIT].adjust(held, gradients)
    for name in SHAPES:
        torch.testing.assert_close(adjusted[name], gradients[name] + held[name].detach() - kept[name])
        assert not torch.allclose(adjusted[name], gradients[name])


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_scaffold_steps_with_the_agreed_variate_in_place_of_its_own(clip_norm):
    held, plain = parameters(), Plain(clip_norm)
    steps = UnitSteps({UNIT: held}, config(SCAFFOLD, clip_norm=clip_norm))
    agreed, own = {}, {}
    for number in range(3):
        steps.terms[UNIT].begin({}, agreed=agreed, own=own)
        seen = []
        for step in range(number + 2):
            raw = tensors(100 * number + step)
            seen.append(raw)
            plain.step({name: one + agreed.get(name, 0.0) - own.get(name, 0.0) for name, one in raw.items()})
            make_step(steps, raw)
            assert_close(held, plain)
        found = steps.terms[UNIT].control()
        for name in SHAPES:
            expected = sum(one[name] for one in seen) / len(seen)
            torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-6)
            assert found[name].dtype == torch.float32
        own, agreed = found, tensors(900 + number)


def test_with_plain_sgd_the_new_variate_is_the_papers_second_option():
    """1910.06378, eq. 4, option II: c_i' = c_i - c + (x - y) / (K eta)."""
    terms, rate, num_steps = UnitTerms(SCAFFOLD), 0.1, 5
    agreed, own, x = tensors(1), tensors(2), tensors(3)
    terms.begin(x, agreed=agreed, own=own)
    y = {name: one.clone() for name, one in x.items()}
    for step in range(num_steps):
        adjusted = terms.adjust(y, tensors(10 + step))
        y = {name: one - rate * adjusted[name] for name, one in y.items()}
    found = terms.control()
    for name in SHAPES:
        expected = own[name] - agreed[name] + (x[name] - y[name]) / (num_steps * rate)
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)


def test_who_was_not_in_the_round_begins_with_the_agreed_variate_and_no_correction():
    terms, agreed = UnitTerms(SCAFFOLD), tensors(1)
    terms.begin({}, agreed=agreed)
    raw = tensors(2)
    assert all(torch.equal(terms.control()[name], agreed[name]) for name in SHAPES)
    adjusted = terms.adjust(parameters(), raw)
    for name in SHAPES:
        torch.testing.assert_close(adjusted[name], raw[name], rtol=1e-6, atol=1e-6)


def test_without_a_step_the_old_variate_stands_and_before_anything_there_is_none():
    terms, own = UnitTerms(SCAFFOLD), tensors(2)
    assert terms.control() == {}
    terms.begin({}, agreed=tensors(1), own=own)
    assert all(torch.equal(terms.control()[name], own[name]) for name in SHAPES)


def test_a_new_round_begins_the_variates_mean_anew_and_given_ones_are_not_changed():
    terms, own = UnitTerms(SCAFFOLD), tensors(2)
    copies = {name: one.clone() for name, one in own.items()}
    for seed in (10, 11):
        terms.begin({}, agreed={}, own=own)
        raw = tensors(seed)
        terms.adjust(parameters(), raw)
        assert all(torch.equal(terms.control()[name], raw[name]) for name in SHAPES)
    assert all(torch.equal(own[name], copies[name]) for name in SHAPES)


@pytest.mark.parametrize("local", [LocalRule(), LocalRule(proximal=1.0), SCAFFOLD], ids=["plain", "prox", "scaffold"])
def test_a_frozen_tensor_gets_neither_decay_nor_momentum_and_the_other_goes_on(local):
    held = parameters()
    steps = UnitSteps({UNIT: held}, config(local))
    for step in range(3):
        make_step(steps, tensors(step))
    own = tensors(50)
    steps.terms[UNIT].begin({name: one.detach() for name, one in held.items()}, frozen=frozenset({A}),
                            agreed=tensors(51), own=own)  # fmt: skip
    before = {name: one.detach().clone() for name, one in held.items()}
    moments = steps.read_moments()[UNIT]
    for step in range(3):
        make_step(steps, tensors(10 + step))
    after = steps.read_moments()[UNIT]
    assert torch.equal(held[A], before[A])
    assert not torch.equal(held[B], before[B])
    for key, value in moments.items():
        assert torch.equal(after[key], value) == key.startswith(A)
    if local.control:
        assert torch.equal(steps.terms[UNIT].control()[A], own[A]), "what is not stepped keeps its variate"


def test_a_frozen_tensor_does_not_count_for_the_clip():
    held, plain = parameters(), Plain(clip_norm=0.5)
    steps = UnitSteps({UNIT: held}, config(LocalRule(), clip_norm=0.5))
    steps.terms[UNIT].begin({}, frozen=frozenset({A}))
    raw = tensors(1)
    make_step(steps, {A: 1000 * raw[A], B: raw[B]})
    plain.step({B: raw[B]})
    assert_close(held, plain)


def test_a_unit_that_is_frozen_whole_does_not_move_and_what_was_thawed_trains_again():
    held = parameters()
    steps = UnitSteps({UNIT: held}, config(LocalRule()))
    steps.terms[UNIT].begin({}, frozen=frozenset(SHAPES))
    make_step(steps, tensors(1))
    assert all(torch.equal(held[name], tensors(0)[name]) for name in SHAPES)
    assert steps.read_moments()[UNIT] == {}
    steps.terms[UNIT].begin({})
    plain = Plain()
    make_step(steps, tensors(2))
    plain.step(tensors(2))
    assert_close(held, plain)


def test_reset_forgets_the_moments_of_the_units_named_and_of_no_other():
    held = {UNIT: parameters(0), OTHER: parameters(1)}
    steps = UnitSteps(held, config(LocalRule()))
    for unit in held:
        make_step(steps, tensors(5), unit)
    kept = steps.read_moments()[OTHER]
    steps.reset_moments([UNIT])
    assert steps.read_moments()[UNIT] == {}
    assert all(torch.equal(steps.read_moments()[OTHER][key], value) for key, value in kept.items())
    fresh = {name: nn.Parameter(one.detach().clone()) for name, one in held[UNIT].items()}
    make_step(steps, tensors(6), UNIT)
    UnitOptimizer(fresh, config(LocalRule())).step(tensors(6), samples=0)
    for name in SHAPES:
        torch.testing.assert_close(held[UNIT][name], fresh[name], rtol=1e-6, atol=1e-7)


def test_without_a_rule_gradients_pass_unchanged_and_nothing_is_kept():
    terms, raw = UnitTerms(LocalRule()), tensors(1)
    terms.begin(tensors(2), agreed=tensors(3), own=tensors(4))
    adjusted = terms.adjust(parameters(), raw)
    assert all(torch.equal(adjusted[name], raw[name]) for name in SHAPES)
    assert terms.control() == {}


def test_a_gradient_that_overflowed_leaves_the_variate_finite():
    """Else the unit's class is not brought, so no round applies, and nothing ever clears the sums."""
    held = parameters()
    steps = UnitSteps({UNIT: held}, config(SCAFFOLD))
    steps.add({UNIT: {name: torch.full(shape, 3e38) for name, shape in SHAPES.items()}})
    make_step(steps, {name: torch.full(shape, 3e37) for name, shape in SHAPES.items()})
    assert all(torch.equal(held[name], tensors(0)[name]) for name in SHAPES)
    make_step(steps, tensors(1))
    assert all(bool(torch.isfinite(one).all()) for one in steps.terms[UNIT].control().values())
