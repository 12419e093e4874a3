"""Vectors of a class: there and back, scaled, and summed to the weighted mean."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from averaging import merge
from averaging.errors import BadTensors
from averaging.robust import combine
from blocks.spans import unit_of

UNITS = [unit_of("default", block) for block in range(3)]


def tensors(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return {
        unit: {"B": torch.randn(2, 3, generator=generator), "A": torch.randn(4, generator=generator)} for unit in UNITS
    }


def test_flatten_and_unflatten_are_inverse_with_names_in_order():
    values = tensors(0)
    vector = merge.flatten(UNITS, values)
    assert vector.shape == (30,)
    assert torch.equal(vector[:4], values[UNITS[0]]["A"])
    back = merge.unflatten(vector, UNITS, values)
    for unit in UNITS:
        for name, tensor in values[unit].items():
            assert torch.equal(back[unit][name], tensor)
    with pytest.raises(ValueError, match="29 values"):
        merge.unflatten(vector[:-1], UNITS, values)


@given(st.lists(st.floats(0.01, 1e6), min_size=2, max_size=5))
def test_the_vectors_combined_by_their_segments_are_the_weighted_mean(weights):
    values = [tensors(seed) for seed in range(len(weights))]
    shares = tuple(weight / sum(weights) for weight in weights)
    vectors = [merge.flatten(UNITS, value) for value in values]
    segments = merge.segments(UNITS, values[0], dict.fromkeys(UNITS, shares))
    assert [(segment.start, segment.stop) for segment in segments] == [(0, 30)]
    reference = merge.weighted_mean(vectors, weights)
    torch.testing.assert_close(combine("none", vectors, segments), reference, rtol=1e-6, atol=1e-6)


def test_each_unit_has_its_own_shares():
    ones = {unit: {name: torch.ones_like(t) for name, t in tensors(0)[unit].items()} for unit in UNITS}
    shares = {UNITS[0]: (1.0, 0.0), UNITS[1]: (0.5, 0.5), UNITS[2]: (0.5, 0.5)}
    segments = merge.segments(UNITS, ones, shares)
    assert [(segment.start, segment.stop, segment.shares) for segment in segments] == [
        (0, 10, (1.0, 0.0)),
        (10, 30, (0.5, 0.5)),
    ]
    vector = merge.flatten(UNITS, ones)
    assert torch.equal(combine("none", [vector, 3 * vector], segments)[9:11], torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("damage", [torch.nan, torch.inf])
def test_values_that_are_not_finite_never_leave(damage):
    values = tensors(0)
    values[UNITS[1]]["A"][2] = damage
    with pytest.raises(BadTensors, match=r"block\.1 A holds values that are not finite"):
        merge.check(UNITS, values)


def test_a_unit_that_is_gone_or_of_another_dtype_is_named():
    values = tensors(0)
    merge.check(UNITS, values)
    values[UNITS[2]]["A"] = values[UNITS[2]]["A"].double()
    with pytest.raises(BadTensors, match=r"block\.2 A is torch.float64"):
        merge.check(UNITS, values)
    del values[UNITS[2]]
    with pytest.raises(BadTensors, match=r"block\.2 was announced"):
        merge.check(UNITS, values)


def test_the_digest_tells_one_bit_apart_even_where_the_values_compare_equal():
    assert merge.digest([torch.zeros(3)]) == merge.digest([torch.zeros(3)])
    assert merge.digest([torch.zeros(3)]) != merge.digest([-torch.zeros(3)])
