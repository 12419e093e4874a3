"""Choosing tokens: by probability, within top_p, the same for a seed and place whatever else happens."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from blocks.decoding.sampling import Chooser

SCORES = torch.tensor([[1.0, 2.0, 0.5, -1.0, 3.0, float("-inf")]])


def ids(length: int) -> Tensor:
    return torch.zeros((1, length), dtype=torch.long)


def choose(chooser: Chooser, place: int, scores: Tensor = SCORES) -> int:
    answer = chooser(ids(place), scores)
    assert answer.shape == scores.shape
    assert int(torch.isfinite(answer).sum()) == len(scores), "only what was chosen is left"
    return int(answer[0].argmax())


def test_without_temperature_the_likeliest_is_chosen() -> None:
    for chooser in (Chooser(temperature=0, top_p=1, seed=1), Chooser(temperature=1, top_p=0, seed=1)):
        assert {choose(chooser, place) for place in range(1, 50)} == {4}


def test_tokens_come_as_often_as_they_are_likely() -> None:
    chooser, throws = Chooser(temperature=0.7, top_p=1, seed=5), 4000
    counts = Counter(choose(chooser, place) for place in range(1, throws + 1))
    wanted = (SCORES[0] / 0.7).softmax(dim=-1)
    for token, probability in enumerate(wanted.tolist()):
        spread = math.sqrt(probability * (1 - probability) / throws)
        assert abs(counts[token] / throws - probability) <= 5 * spread
    assert counts[5] == 0


def test_top_p_keeps_the_fewest_tokens_that_make_up_so_much() -> None:
    order = SCORES[0].softmax(dim=-1).sort(descending=True)
    two = float(order.values[:2].sum())
    for top_p, kept in ((two - 0.01, 2), (two + 0.01, 3), (1e-9, 1)):
        chooser = Chooser(temperature=1, top_p=top_p, seed=2)
        assert {choose(chooser, place) for place in range(1, 400)} == set(order.indices[:kept].tolist())


def test_a_seed_and_a_place_decide_alone() -> None:
    scores = torch.randn((1, 50), generator=torch.Generator().manual_seed(1))
    forward = [choose(Chooser(temperature=1, top_p=1, seed=7), place, scores) for place in range(1, 40)]
    again = Chooser(temperature=1, top_p=1, seed=7)
    for place in range(39, 0, -1):  # as guesses ahead ask, and with others between
        torch.rand(3)
        assert choose(again, place, scores) == forward[place - 1]
    assert [choose(Chooser(temperature=1, top_p=1, seed=8), place, scores) for place in range(1, 40)] != forward


def test_texts_of_a_batch_have_dice_of_their_own() -> None:
    scores = torch.zeros((2, 1000))
    answer = Chooser(temperature=1, top_p=1, seed=3)(torch.zeros((2, 4), dtype=torch.long), scores)
    first, second = answer.argmax(dim=-1).tolist()
    assert first != second


def test_probabilities_are_noted_before_temperature_and_forgotten_when_asked() -> None:
    chooser = Chooser(temperature=0.1, top_p=0.5, seed=1, top_logprobs=2)
    chosen = choose(chooser, 9)
    noted = chooser.noted(9)
    assert noted is not None
    logprobs = SCORES[0].log_softmax(dim=-1)
    assert noted.chosen.token == chosen
    assert noted.chosen.logprob == pytest.approx(float(logprobs[chosen]))
    assert [best.token for best in noted.best] == [4, 1]
    assert noted.best[0].logprob == pytest.approx(float(logprobs[4]))
    assert chooser.noted(9) is None
    silent = Chooser(temperature=0.1, top_p=0.5, seed=1)
    choose(silent, 9)
    assert silent.noted(9) is None


@given(
    temperature=st.floats(1e-320, 1e3),
    top_p=st.floats(0, 1),
    scale=st.sampled_from([0.0, 1.0, 1e30, 3e38]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_there_is_always_a_choice(temperature: float, top_p: float, scale: float, seed: int) -> None:
    scores = torch.tensor([[0.1, -0.2, 1.0, float("-inf")]]) * scale if scale else torch.zeros((1, 4))
    assert 0 <= choose(Chooser(temperature=temperature, top_p=top_p, seed=seed), 3, scores) < 4


def test_numbers_that_make_no_choice_are_refused() -> None:
    for temperature, top_p, top in ((-1, 1, None), (float("nan"), 1, None), (1, 1.1, None), (1, 1, 21), (1, -0.1, 3)):
        with pytest.raises(ValueError, match=r"cannot be noted|do not make a choice"):
            Chooser(temperature=temperature, top_p=top_p, seed=0, top_logprobs=top)
