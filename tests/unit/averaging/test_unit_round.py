"""Each recipe through three rounds of three holders, against references that are written out here."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from averaging import merge
from averaging.errors import BadTensors
from averaging.feedback import Feedback
from averaging.merging import UnitView
from averaging.planning import Plan
from averaging.recipe import Recipe
from averaging.unit_round import CONTROL, UnitInput, UnitRules, check_outer_state
from averaging.unit_work import RoundWork
from blocks.spans import unit_of

UNIT = unit_of("default", 3)
A, B = "attn.q.lora_A", "attn.q.lora_B"
SHAPES = {A: (3, 7), B: (5, 3)}
SHARES = (0.5, 0.3, 0.2)
SCALING = 2.0


def tensors(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def step_of(number: int, holder: int):
    """What one holder's training adds between two rounds."""
    return {name: 0.1 * change for name, change in tensors(100 * number + holder).items()}


def variate_of(number: int, holder: int):
    return tensors(1000 + 100 * number + holder)


def given(live, anchor, outer, number, control=None) -> UnitInput:
    view = UnitView(unit=UNIT, round=number, live=live, anchor=anchor, outer=outer, scaling=SCALING)
    return UnitInput(view=view, control=control or {})


def trained(rules: UnitRules, anchor, number: int, holder: int):
    frozen = rules.frozen(anchor, number)
    return {name: value if name in frozen else value + step_of(number, holder)[name] for name, value in anchor.items()}


def play(recipe: Recipe, *, with_controls: bool = False):
    """Three rounds; per round the anchor before, the holders' trained tensors and the holders' results."""
    rules = [UnitRules(recipe, seed=7, rank=3) for _ in SHARES]
    states, history = [(tensors(0), {}) for _ in SHARES], []
    for number in range(3):
        anchor = states[0][0]
        lives = [trained(one, state[0], number, holder) for holder, (one, state) in
                 enumerate(zip(rules, states, strict=True))]  # fmt: skip
        inputs = [
            given(live, *state, number, variate_of(number, holder) if with_controls else None)
            for holder, (live, state) in enumerate(zip(lives, states, strict=True))
        ]
        means = []
        for _ in range(rules[0].merging.passes):
            brought = [one.bring(unit, means) for one, unit in zip(rules, inputs, strict=True)]
            assert all(one.keys() == brought[0].keys() for one in brought)
            means.append({name: sum(share * one[name] for share, one in zip(SHARES, brought, strict=True))
                          for name in brought[0]})  # fmt: skip
        results = [one.finish(unit, means) for one, unit in zip(rules, inputs, strict=True)]
        for one in results:
            check_outer_state(one.outer, one.tensors)
        assert_equal_to_the_bit(results)
        states = [(dict(one.tensors), dict(one.outer)) for one in results]
        history.append((anchor, lives, results))
    return history


def assert_equal_to_the_bit(results):
    for one in results[1:]:
        for mine, first in ((one.tensors, results[0].tensors), (one.outer, results[0].outer)):
            assert mine.keys() == first.keys()
            assert all(torch.equal(mine[name], first[name]) for name in mine)


def mean(many, name):
    return sum(share * one[name].double() for share, one in zip(SHARES, many, strict=True))


def close(found, expected):
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-6, atol=1e-6)


def trained_names(merging: str, number: int) -> set[str]:
    return {"mean": {A, B}, "ffa": {B}, "rolora": {B} if number % 2 == 0 else {A}}[merging]


@pytest.mark.parametrize("merging", ["mean", "ffa", "rolora"])
def test_what_is_trained_becomes_the_mean_and_the_rest_stays_to_the_bit(merging):
    reference = {name: value.double() for name, value in tensors(0).items()}
    for number, (anchor, _, results) in enumerate(play(Recipe(merging=merging))):
        for name in SHAPES:
            if name in trained_names(merging, number):
                reference[name] = reference[name] + mean([step_of(number, holder) for holder in range(3)], name)
                assert not torch.equal(results[0].tensors[name], anchor[name])
            else:
                assert torch.equal(results[0].tensors[name], anchor[name])
            close(results[0].tensors[name], reference[name])
        assert results[0].outer == {}
        assert not results[0].resets_moments


@pytest.mark.parametrize("merging", ["ffa", "rolora"])
def test_with_a_half_frozen_the_merged_product_is_the_mean_of_the_products(merging):
    for _, lives, results in play(Recipe(merging=merging)):
        products = [{"M": live[B].double() @ live[A].double()} for live in lives]
        close(results[0].tensors[B].double() @ results[0].tensors[A].double(), mean(products, "M"))


@pytest.mark.parametrize("merging", ["mean", "rolora"])
def test_nesterov_on_what_was_merged_is_torchs_own(merging):
    reference = {name: torch.nn.Parameter(value.double()) for name, value in tensors(0).items()}
    optimizers = {name: torch.optim.SGD([one], lr=0.6, momentum=0.8, nesterov=True) for name, one in reference.items()}
    recipe = Recipe(merging=merging, outer="nesterov", outer_learning_rate=0.6, outer_momentum=0.8)
    for number, (anchor, lives, results) in enumerate(play(recipe)):
        for name in trained_names(merging, number):
            reference[name].grad = -mean([step_of(number, holder) for holder in range(3)], name)
            optimizers[name].step()
        for name, parameter in reference.items():
            close(results[0].tensors[name], parameter.detach())
            close(results[0].merged[name], mean(lives, name))
            assert (name in trained_names(merging, number)) != torch.equal(results[0].tensors[name], anchor[name])


def test_adam_on_what_was_merged_is_the_loop():
    reference = {name: value.double() for name, value in tensors(0).items()}
    first, second = ({name: torch.zeros(shape).double() for name, shape in SHAPES.items()} for _ in range(2))
    recipe = Recipe(outer="adam", outer_learning_rate=0.01, outer_momentum=0.9)
    for number, (_, _, results) in enumerate(play(recipe)):
        for name in SHAPES:
            gradient = -mean([step_of(number, holder) for holder in range(3)], name)
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.99 * second[name] + 0.01 * gradient**2
            move = first[name] / (1 - 0.9 ** (number + 1)) / (second[name] / (1 - 0.99 ** (number + 1))).sqrt()
            reference[name] = reference[name] - 0.01 * move
            torch.testing.assert_close(results[0].tensors[name].double(), reference[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("merging", ["mean", "ffa"])
def test_scaffolds_agreed_variate_is_the_mean_of_the_holders_and_leaves_the_tensors_alone(merging):
    with_controls = play(Recipe(merging=merging, local="scaffold"), with_controls=True)
    without = play(Recipe(merging=merging))
    for number, ((_, _, results), (_, _, plain)) in enumerate(zip(with_controls, without, strict=True)):
        assert results[0].outer.keys() == {CONTROL + name for name in SHAPES}
        for name in SHAPES:
            close(results[0].outer[CONTROL + name], mean([variate_of(number, holder) for holder in range(3)], name))
            assert torch.equal(results[0].tensors[name], plain[0].tensors[name])


@pytest.mark.parametrize("merging", ["mean", "ffa", "rolora"])
def test_averaged_moments_are_the_mean_of_the_holders_and_no_part_of_the_state(merging):
    rules, plain = (UnitRules(Recipe(merging=merging, moments=kind), seed=7, rank=3) for kind in ("mean", "own"))
    anchor = tensors(0)
    lives = [trained(rules, anchor, 0, holder) for holder in range(3)]
    said = [
        {
            f"{name}/{kind}": tensor
            for kind, seed in (("mean", 50), ("rms", 60))
            for name, tensor in tensors(seed + holder).items()
        }
        for holder in range(2)
    ] + [{}]  # the third has made no step yet
    inputs = [replace(given(live, anchor, {}, 0), moments=own) for live, own in zip(lives, said, strict=True)]
    brought = [rules.bring(unit, []) for unit in inputs]
    means = [{name: sum(share * one[name] for share, one in zip(SHARES, brought, strict=True)) for name in brought[0]}]
    results = [rules.finish(unit, means) for unit in inputs]
    assert_equal_to_the_bit(results)
    assert results[0].outer == {}
    assert results[0].moments.keys() == {f"{n}/{k}" for n in trained_names(merging, 0) for k in ("mean", "rms")}
    for key, tensor in results[0].moments.items():
        close(tensor, sum(share * own[key].double() for share, own in zip(SHARES, said[:2], strict=False)))
    expected = plain.finish(inputs[0], [{n: t for n, t in means[0].items() if not n.startswith("moment/")}])
    assert all(torch.equal(results[0].tensors[name], expected.tensors[name]) for name in SHAPES)
    assert not expected.moments
    assert not any(name.startswith("moment/") for name in plain.bring(inputs[0], []))


def test_outer_momentum_and_variates_live_side_by_side():
    recipe = Recipe(local="scaffold", outer="nesterov")
    both, nesterov = play(recipe, with_controls=True), play(Recipe(outer="nesterov"))
    for (_, _, results), (_, _, plain) in zip(both, nesterov, strict=True):
        kinds = {key.partition("/")[0] for key in results[0].outer}
        assert kinds == {"control", "velocity"}
        assert all(torch.equal(results[0].outer[key], value) for key, value in plain[0].outer.items())
        assert all(torch.equal(results[0].tensors[name], plain[0].tensors[name]) for name in SHAPES)


def test_power_keeps_the_mean_product_where_it_fits_the_rank_and_voids_the_moments():
    """Each holder trained one direction of its own, so that the mean product has the run's rank."""
    rules, results = UnitRules(Recipe(merging="power"), seed=7, rank=3), []
    lives = [{A: tensors(h)[A][:1].repeat(3, 1), B: tensors(h)[B][:, :1].repeat(1, 3)} for h in range(3)]
    anchor = tensors(9)
    inputs = [given(live, anchor, {}, 0) for live in lives]
    means: list[dict[str, torch.Tensor]] = []
    for _ in range(2):
        brought = [rules.bring(unit, means) for unit in inputs]
        means.append({name: mean(brought, name).float() for name in brought[0]})
    results = [rules.finish(unit, means) for unit in inputs]
    assert_equal_to_the_bit(results)
    assert all(one.resets_moments for one in results)
    expected = mean([{"M": live[B].double() @ live[A].double()} for live in lives], "M")
    found = results[0].tensors[B].double() @ results[0].tensors[A].double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert results[0].outer.keys() == {"basis/attn.q"}
    check_outer_state(results[0].outer, results[0].tensors)


@pytest.mark.parametrize("outer", ["none", "nesterov", "adam"])
def test_an_alone_holder_takes_the_outer_step_on_its_own_change(outer):
    recipe = Recipe(outer=outer, outer_learning_rate=0.05)
    rules, plan = UnitRules(recipe), Plan(shares={UNIT: (1.0,)}, samples={UNIT: 4.0}, alone=(UNIT,), kept={})
    anchor, outer_state = tensors(0), {}
    for number in range(3):
        live = trained(rules, anchor, number, 0)
        unit = given(live, anchor, outer_state, number)
        work = RoundWork(rules, plan, {UNIT: unit}, number + 1)
        assert work.entries(Feedback()) == []
        applied, kept, error = work.finish({}, {}, {}, Feedback())
        expected = rules.finish(unit, [{name: live[name] - anchor[name] for name in SHAPES}])
        assert_equal_to_the_bit([applied[UNIT], expected])
        assert (kept, error) == ({}, None)
        for name in SHAPES:
            assert torch.allclose(applied[UNIT].tensors[name], live[name], atol=1e-6) == (outer == "none")
        anchor, outer_state = dict(applied[UNIT].tensors), dict(applied[UNIT].outer)
    assert bool(outer_state) == (outer != "none")


def test_an_alone_holders_moments_stay_as_they_are():
    rules = UnitRules(Recipe(moments="mean"))
    plan = Plan(shares={UNIT: (1.0,)}, samples={UNIT: 4.0}, alone=(UNIT,), kept={})
    own = {f"{name}/{kind}": torch.ones(shape) for name, shape in SHAPES.items() for kind in ("mean", "rms")}
    unit = replace(given(trained(rules, tensors(0), 0, 0), tensors(0), {}, 0), moments=own)
    applied, _, _ = RoundWork(rules, plan, {UNIT: unit}, 1).finish({}, {}, {}, Feedback())
    assert not applied[UNIT].moments
    assert applied[UNIT].tensors.keys() == SHAPES.keys()


def test_an_alone_unit_that_is_gone_is_kept_with_the_reason():
    plan = Plan(shares={UNIT: (1.0,)}, samples={UNIT: 4.0}, alone=(UNIT,), kept={})
    applied, kept, _ = RoundWork(UnitRules(Recipe()), plan, {}, 1).finish({}, {}, {}, Feedback())
    assert applied == {}
    assert "not held" in kept[UNIT]


def test_probes_are_linear_in_the_product_and_differ_between_rounds():
    rules, one = UnitRules(Recipe(), seed=7), tensors(0)
    doubled = {A: one[A], B: 2 * one[B]}
    close(rules.probes(doubled, SCALING, 1), 2 * rules.probes(one, SCALING, 1))
    assert not torch.allclose(rules.probes(one, SCALING, 1), rules.probes(one, SCALING, 2))
    assert torch.equal(rules.probes({**one, "bias": torch.ones(3)}, SCALING, 1), rules.probes(one, SCALING, 1))


def test_a_holder_that_made_no_step_brings_as_many_values_as_one_that_did():
    """Else the class's vectors differ in length, and nobody's round happens."""
    rules, anchor = UnitRules(Recipe(local="scaffold")), tensors(0)
    busy = rules.bring(given(anchor, anchor, {}, 0, variate_of(0, 0)), [])
    idle = rules.bring(given(anchor, anchor, {}, 0, {}), [])
    assert merge.flatten([UNIT], {UNIT: idle}).numel() == merge.flatten([UNIT], {UNIT: busy}).numel()


HOSTILE = {
    "nothing/" + A: torch.zeros(SHAPES[A]),
    "control/other.lora_A": torch.zeros(SHAPES[A]),
    "control": torch.zeros(SHAPES[A]),
    "control/": torch.zeros(SHAPES[A]),
    CONTROL + B: torch.zeros(SHAPES[B]).double(),
    CONTROL + A: torch.zeros(SHAPES[B]),
    "control//" + A: torch.zeros(SHAPES[A]),
    "basis/attn.k": torch.zeros(7, 3),
    "basis/attn.q": torch.zeros(3, 7),
    "velocity/other.lora_A": torch.zeros(SHAPES[A]),
    "velocity/" + A: torch.zeros(1),
    "second/" + A: torch.zeros(SHAPES[A]),
    "step/" + A: torch.ones(1),
    "../" + A: torch.zeros(SHAPES[A]),
}


@pytest.mark.parametrize("key", HOSTILE)
def test_agreed_state_that_cannot_belong_to_the_unit_is_refused(key):
    with pytest.raises(BadTensors):
        check_outer_state({key: HOSTILE[key]}, tensors(0))
    good = {"basis/attn.q": torch.ones(7, 3), CONTROL + A: torch.ones(SHAPES[A]), "velocity/" + B: torch.ones(5, 3)}
    check_outer_state(good, tensors(0))
    with pytest.raises(BadTensors):
        check_outer_state({**good, key: HOSTILE[key]}, tensors(0))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("key", "shape"), [(CONTROL + A, (3, 7)), ("basis/attn.q", (7, 3)), ("velocity/" + A, (3, 7))])
def test_agreed_state_that_is_not_finite_is_refused(key, shape, value):
    state = torch.zeros(shape)
    check_outer_state({key: state}, tensors(0))
    state[0, 0] = value
    with pytest.raises(BadTensors):
        check_outer_state({key: state}, tensors(0))


def test_a_basis_of_more_directions_than_the_rank_is_refused():
    with pytest.raises(BadTensors, match="does not fit"):
        check_outer_state({"basis/attn.q": torch.zeros(7, 4)}, tensors(0))


@pytest.mark.parametrize("shape", [(7,), (7, 1, 3), (7, 0)])
def test_a_basis_that_is_no_matrix_with_directions_is_refused(shape):
    with pytest.raises(BadTensors):
        check_outer_state({"basis/attn.q": torch.zeros(shape)}, tensors(0))
