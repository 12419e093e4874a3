"""Every way to merge against formulas written here, power against the dense optimum, the error against the truth."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from averaging.errors import BadTensors
from averaging.merging import MERGINGS, UnitView, make_merging, merging_error, probes
from blocks.spans import unit_of

UNIT = unit_of("default", 3)
SIZES = {"mlp.down": (24, 18), "attn.q": (16, 20)}  # module: (out, in)
RANK = 4
GOLDEN_BASIS = [[-0.1600119, -0.6778392], [-0.9716561, 0.2363079], [0.1740132, 0.6961986]]  # of seed 7 and module m


def factors(seed: int, rank: int = RANK, scale: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (num_out, num_in) in SIZES.items():
        # Directions of different strength, as trained adapters have, so that there is a best rank to keep.
        strength = 2.0 ** -torch.arange(rank)
        tensors[f"{module}.lora_A"] = scale * torch.randn(rank, num_in, generator=generator)
        tensors[f"{module}.lora_B"] = scale * torch.randn(num_out, rank, generator=generator) * strength
    return tensors


def moved(anchor, seed, names=None):
    change = factors(seed, scale=0.3)
    return {name: value + change[name] if names is None or name in names else value for name, value in anchor.items()}


def view(live, anchor, number=0, outer=None, scaling=2.0):
    return UnitView(unit=UNIT, round=number, live=live, anchor=anchor, outer=outer or {}, scaling=scaling)


def run_round(rule, views, shares):
    """What the exchange does: all passes, the weighted sum of each, in fp32 as it travels."""
    means = []
    for _ in range(rule.passes):
        brought = [rule.bring(one, means) for one in views]
        assert all(value.dtype == torch.float32 for one in brought for value in one.values())
        means.append({name: sum(one[name] * s for one, s in zip(brought, shares, strict=True)) for name in brought[0]})
    return [rule.merge(one, means) for one in views]


def product(tensors, module, scaling=1.0):
    return scaling * tensors[f"{module}.lora_B"].double() @ tensors[f"{module}.lora_A"].double()


def mean_product(views, shares, module):
    return sum(s * product(one.live, module, one.scaling) for one, s in zip(views, shares, strict=True))


def best(matrix, rank):
    u, s, vt = torch.linalg.svd(matrix)
    return u[:, :rank] * s[:rank] @ vt[:rank]


def halves(tensors, end):
    return {name for name in tensors if name.endswith(end)}


def test_mean_is_the_weighted_mean_of_every_tensor():
    anchor, shares = factors(0), [0.5, 0.2, 0.3]
    lives = [moved(anchor, seed) for seed in (1, 2, 3)]
    rule = make_merging("mean", seed=1, rank=RANK)
    for merged in run_round(rule, [view(live, anchor) for live in lives], shares):
        assert not merged.resets_moments
        assert not merged.outer
        for name in anchor:
            expected = sum(s * live[name].double() for s, live in zip(shares, lives, strict=True))
            torch.testing.assert_close(merged.tensors[name].double(), expected, rtol=1e-6, atol=1e-6)
    assert rule.frozen(anchor, 3) == frozenset()


@pytest.mark.parametrize(
    ("name", "number", "kept"),
    [("ffa", 0, "A"), ("ffa", 1, "A"), ("rolora", 0, "A"), ("rolora", 1, "B"), ("rolora", 2, "A"), ("rolora", 7, "B")],
)
def test_with_one_half_frozen_the_merged_product_is_the_mean_product(name, number, kept):
    anchor, shares = factors(0), [0.6, 0.4]
    rule = make_merging(name, seed=1, rank=RANK)
    frozen = rule.frozen(anchor, number)
    assert frozen == halves(anchor, f"lora_{kept}")
    views = [view(moved(anchor, seed, set(anchor) - frozen), anchor, number) for seed in (1, 2)]
    assert set(rule.bring(views[0], [])) == set(anchor) - frozen  # half the bytes
    for merged in run_round(rule, views, shares):
        assert all(torch.equal(merged.tensors[name], anchor[name]) for name in frozen)
        for module in SIZES:
            expected = mean_product(views, shares, module)
            torch.testing.assert_close(product(merged.tensors, module, 2.0), expected, rtol=1e-6, atol=1e-5)
            assert (expected - product(anchor, module, 2.0)).norm() > 1


def test_a_frozen_half_that_moved_all_the_same_falls_back_to_the_anchor():
    anchor = factors(0)
    merged = run_round(make_merging("ffa", seed=1, rank=RANK), [view(moved(anchor, 1), anchor)], [1.0])[0]
    assert all(torch.equal(merged.tensors[name], anchor[name]) for name in halves(anchor, "lora_A"))


@pytest.mark.parametrize("ranks", [(4, 4, 4), (2, 4, 3), (1, 4, 4)])
def test_power_reaches_the_dense_optimum_of_each_rank_after_a_few_warm_rounds(ranks):
    shares, scalings = [0.5, 0.2, 0.3], [2.0, 0.5, 1.0]
    rule = make_merging("power", seed=1, rank=RANK)
    lives = [factors(seed, rank) for seed, rank in enumerate(ranks)]
    outers, gaps = [{}, {}, {}], []
    for number in range(12):
        views = [
            view(live, live, number, outer, scaling)
            for live, outer, scaling in zip(lives, outers, scalings, strict=True)
        ]
        results = run_round(rule, views, shares)
        outers = [merged.outer for merged in results]
        gap = 0.0
        for rank, merged, scaling in zip(ranks, results, scalings, strict=True):
            assert merged.resets_moments
            for module in SIZES:
                dense = mean_product(views, shares, module)
                optimum = (dense - best(dense, rank)).norm()
                error = (dense - product(merged.tensors, module, scaling)).norm()
                assert merged.tensors[f"{module}.lora_A"].shape == (rank, SIZES[module][1])
                assert error >= optimum * (1 - 1e-6)
                gap = max(gap, float((error - optimum) / dense.norm()))
        gaps.append(gap)
    assert gaps[-1] < 1e-3
    assert gaps[-1] < gaps[0] / 20  # warm starts are what brings it there
    assert all(torch.equal(outers[0][key], other[key]) for other in outers for key in other)


@pytest.mark.parametrize("common", [1, 2, 4])
def test_power_is_exact_at_once_where_the_mean_product_fits_and_no_row_dies(common):
    """`common`: the rank that all products share. Below the run's rank there are directions without any product."""
    base = factors(0)
    for name, value in base.items():
        (value[common:] if name.endswith("A") else value[:, common:]).zero_()
    lives = [{name: v if name.endswith("A") else v * (1 + s) for name, v in base.items()} for s in range(2)]
    fresh = factors(9)
    views = [view(live, fresh) for live in lives]
    for merged in run_round(make_merging("power", seed=1, rank=RANK), views, [0.5, 0.5]):
        for module in SIZES:
            dense = mean_product(views, [0.5, 0.5], module)
            found = product(merged.tensors, module, 2.0)
            # A first basis is random, so that fp32 on the way costs a few units in the last place.
            assert (found - dense).norm() < 4e-6 * dense.norm()
            basis = merged.outer[f"basis/{module}"]
            torch.testing.assert_close(basis.T @ basis, torch.eye(RANK), rtol=0, atol=1e-6)
            a, b = merged.tensors[f"{module}.lora_A"], merged.tensors[f"{module}.lora_B"]
            assert torch.equal(a[common:], fresh[f"{module}.lora_A"][common:])
            assert not b[:, common:].any()
            torch.testing.assert_close(a[:common].norm(dim=1), b[:, :common].norm(dim=0), rtol=1e-5, atol=0)


def test_power_keeps_weak_directions_apart_from_strong_ones():
    """A drawn basis mixes them, so that the columns of the first pass are nearly parallel."""
    strength = torch.tensor([1.0, 3e-2, 1e-3, 3e-5])
    live = factors(0)
    for name in halves(live, "lora_B"):
        live[name] = torch.linalg.qr(live[name])[0] * strength
    merged = run_round(make_merging("power", seed=1, rank=RANK), [view(live, live)], [1.0])[0]
    for module in SIZES:
        dense = product(live, module, 2.0)
        assert (product(merged.tensors, module, 2.0) - dense).norm() < 1e-6 * dense.norm()


def test_a_gap_in_the_basis_is_filled_from_the_old_one():
    rule, live = make_merging("power", seed=1, rank=2), factors(0, rank=1)
    first = run_round(rule, [view(live, live)], [1.0])[0].outer
    again = run_round(rule, [view(live, live, 1, first)], [1.0])[0].outer
    for key, value in first.items():
        torch.testing.assert_close(again[key], value, rtol=0, atol=1e-5)


def test_power_keeps_the_anchor_where_nothing_was_trained_yet_each_at_its_own_rank():
    lives = [factors(seed, rank) for seed, rank in enumerate((2, 4))]
    for live in lives:
        for name in halves(live, "lora_B"):
            live[name].zero_()
    rule = make_merging("power", seed=1, rank=RANK)
    results = run_round(rule, [view(live, live) for live in lives], [0.5, 0.5])
    for live, merged in zip(lives, results, strict=True):
        assert all(torch.equal(merged.tensors[name], live[name]) for name in live)
    # The next round's basis is the same whether the first was handed on or made anew from the same anchor.
    trained = factors(5)
    for live, merged in zip(lives, results, strict=True):
        made = rule.bring(view(trained, live), [])
        kept = rule.bring(view(trained, live, 1, merged.outer), [])
        assert all(torch.equal(made[name], kept[name]) for name in made)


def test_power_works_where_a_side_is_narrower_than_the_rank():
    live = {"m.lora_A": torch.randn(6, 3), "m.lora_B": torch.randn(5, 6)}
    merged = run_round(make_merging("power", seed=1, rank=8), [view(live, live)], [1.0])[0]
    torch.testing.assert_close(product(merged.tensors, "m"), product(live, "m"), rtol=1e-5, atol=1e-5)
    assert merged.tensors["m.lora_A"].shape == (6, 3)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(MERGINGS), st.integers(0, 5), st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4))
def test_all_holders_end_equal_to_the_bit_and_nothing_given_is_changed(name, number, weights):
    rule, anchor = make_merging(name, seed=number, rank=RANK), factors(number)
    before = {key: value.clone() for key, value in anchor.items()}
    views = [view(moved(anchor, seed), anchor, number) for seed in range(len(weights))]
    results = run_round(rule, views, [weight / sum(weights) for weight in weights])
    for merged in results:
        assert set(merged.tensors) == set(anchor)
        for key, value in (dict(merged.tensors) | dict(merged.outer)).items():
            other = results[0].outer.get(key, results[0].tensors.get(key))
            assert value.dtype == torch.float32
            assert value.shape == anchor.get(key, value).shape
            assert torch.equal(value, other)
            assert value.data_ptr() != anchor.get(key, torch.zeros(1)).data_ptr()
    assert all(torch.equal(anchor[key], value) for key, value in before.items())


def test_the_first_basis_is_the_same_on_every_machine():
    """A value of its own in here, so that a change of the generator, which splits a run, does not go unseen."""
    live = {"m.lora_A": torch.eye(3), "m.lora_B": torch.eye(3)}
    brought = make_merging("power", seed=7, rank=2).bring(view(live, live, scaling=1.0), [])["m.left"]
    expected = torch.tensor(GOLDEN_BASIS)
    torch.testing.assert_close(brought, expected, rtol=0, atol=1e-6)
    assert not torch.equal(brought, make_merging("power", seed=8, rank=2).bring(view(live, live), [])["m.left"])


def test_what_cannot_be_merged_is_refused_with_a_reason():
    with pytest.raises(ValueError, match="use one of mean, ffa, rolora, power"):
        make_merging("median", seed=0, rank=4)
    with pytest.raises(ValueError, match="rank is 0"):
        make_merging("power", seed=0, rank=0)
    live = factors(0)
    for scaling in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="scaling"):
            view(live, live, scaling=scaling)
    power = make_merging("power", seed=0, rank=RANK)
    odd = {**live, "head.weight": torch.zeros(3)}
    with pytest.raises(BadTensors, match=r"head\.weight"):
        power.bring(view(odd, odd), [])
    for basis in (torch.zeros(18, 3), torch.full((18, 4), math.inf)):
        with pytest.raises(BadTensors, match="agreed basis"):
            power.bring(view(live, live, outer={"basis/mlp.down": basis}), [])


def test_probes_are_linear_in_the_product_and_blind_to_how_it_is_factored():
    one, turn = factors(0), torch.linalg.qr(torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(1)))[0]
    other = {name: turn @ v if name.endswith("A") else v @ turn.T for name, v in one.items()}
    first = probes(one, 2.0, seed=1, number=5)
    assert first.shape == (8,)
    assert first.dtype == torch.float32
    torch.testing.assert_close(probes(other, 2.0, seed=1, number=5), first, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probes(one, 1.0, seed=1, number=5), first / 2)
    longer = probes(one, 2.0, seed=1, number=5, count=6).view(2, 6)
    assert torch.equal(longer[:, :4], first.view(2, 4))
    assert not torch.isclose(probes(one, 2.0, seed=1, number=6), first).any()
    assert not torch.isclose(probes(one, 2.0, seed=2, number=5), first).any()


def test_the_error_measured_by_probes_is_the_dense_error():
    anchor, shares, count = factors(0), [0.7, 0.3], 1500
    views = [view(moved(anchor, seed), anchor) for seed in (1, 2)]
    merged = run_round(make_merging("mean", seed=1, rank=RANK), views, shares)[0]
    brought = [probes(one.live, one.scaling, seed=1, number=0, count=count) for one in views]
    found = merging_error(brought, shares, probes(merged.tensors, 2.0, seed=1, number=0, count=count))
    gaps = {m: mean_product(views, shares, m) - product(merged.tensors, m, 2.0) for m in SIZES}
    gap = math.hypot(*(float(one.norm()) for one in gaps.values()))
    norm = math.hypot(*(float(mean_product(views, shares, module).norm()) for module in SIZES))
    assert gap / norm > 0.01
    assert found == pytest.approx(gap / norm, rel=0.15)
    assert float(brought[0].double().square().mean()) * len(SIZES) == pytest.approx(
        sum(float(product(views[0].live, module, 2.0).square().sum()) for module in SIZES), rel=0.2
    )


def test_the_error_is_defined_where_the_products_are_zero():
    zero, one = torch.zeros(4), torch.ones(4)
    assert merging_error([zero, zero], [0.5, 0.5], zero) == 0.0
    assert merging_error([one, -one], [0.5, 0.5], one) == math.inf
    assert merging_error([one, one * math.inf], [1.0, 0.0], one * 0.5) == pytest.approx(0.5)
    assert probes({}, 1.0, seed=0, number=0).shape == (0,)
