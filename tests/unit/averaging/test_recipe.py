"""Which rules go together, and that no two recipes pass for one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import fields

import pytest

from averaging.recipe import CODECS, LOCALS, MERGINGS, MOMENTS, OUTERS, ROBUST, WEIGHTINGS, Recipe

CHOICES = {
    "merging": MERGINGS,
    "local": LOCALS,
    "weighting": WEIGHTINGS,
    "moments": MOMENTS,
    "outer": OUTERS,
    "codec": CODECS,
    "robust": ROBUST,
    "overlap": (False, True),
}
ROBUST_RULES = {"clip", "trimmed", "krum"}
QUARRELS = [
    ({"merging": {"power"}}, {"outer": {"nesterov", "adam"}}),
    ({"merging": {"power"}}, {"local": {"scaffold", "fednova"}}),
    ({"merging": {"power"}}, {"codec": {"fp16", "int8", "int4", "topk"}}),
    ({"local": {"scaffold"}}, {"codec": {"topk"}}),
    ({"merging": {"power"}}, {"robust": ROBUST_RULES}),
    ({"robust": ROBUST_RULES}, {"weighting": {"samples", "tokens"}}),
    ({"robust": ROBUST_RULES}, {"local": {"scaffold", "fednova"}}),
    ({"robust": ROBUST_RULES}, {"codec": {"topk"}}),
    ({"overlap": {True}}, {"merging": {"rolora", "power"}}),
    ({"overlap": {True}}, {"local": {"scaffold"}}),
    ({"overlap": {True}}, {"moments": {"mean"}}),
    ({"moments": {"mean"}}, {"merging": {"power"}}),
    ({"moments": {"mean"}}, {"local": {"fednova"}}),
    ({"moments": {"mean"}}, {"robust": ROBUST_RULES}),
    ({"moments": {"mean"}}, {"codec": {"int4", "topk"}}),
]
"""Pairs that make no sense, written down a second time."""

CHANGED = {
    "merging": "ffa",
    "local": "fedprox",
    "proximal": 0.02,
    "weighting": "tokens",
    "moments": "mean",
    "outer": "nesterov",
    "outer_learning_rate": 0.8,
    "outer_momentum": 0.8,
    "codec": "int8",
    "top_share": 0.1,
    "lossless": True,
    "robust": "clip",
    "overlap": True,
}


def made(**rules) -> Recipe:
    """Adam's rate must be small, which is no matter of two names."""
    return Recipe(**({"outer_learning_rate": 0.01} | rules))


def quarrelling(rules) -> list[tuple[str, str]]:
    """The names of all pairs in `rules` that do not go together."""
    found = []
    for first, second in QUARRELS:
        (one, bad), (other, worse) = next(iter(first.items())), next(iter(second.items()))
        if rules[one] in bad and rules[other] in worse:
            found.append((one, other))
    return found


def written(name: str, value: object) -> str:
    return "overlap = true" if name == "overlap" else f"{name} = '{value}'"


def pairs() -> Iterator[dict[str, object]]:
    for (one, ones), (other, others) in itertools.combinations(CHOICES.items(), 2):
        for value, second in itertools.product(ones, others):
            yield {one: value, other: second}


def test_every_pair_that_makes_no_sense_is_refused_by_both_names_and_no_other_pair_is():
    refused = 0
    for pair in pairs():
        # What a robust rule needs besides is no part of the pair.
        rules = {name: choices[0] for name, choices in CHOICES.items()}
        if pair.get("robust", "none") != "none" and "weighting" not in pair:
            rules["weighting"] = "equal"
        rules |= pair
        bad = quarrelling(rules)
        if not bad:
            made(**rules)
            continue
        refused += 1
        with pytest.raises(ValueError, match="do not go together") as error:
            made(**rules)
        for name in bad[0]:
            assert written(name, rules[name]) in str(error.value)
        assert set(bad[0]) == set(pair)
    assert refused == 2 + 2 + 4 + 1 + 3 + 6 + 6 + 3 + 2 + 1 + 1 + 1 + 1 + 3 + 2


def test_every_combination_builds_exactly_when_no_two_of_its_rules_quarrel():
    outcomes = {True: 0, False: 0}
    for values in itertools.product(*CHOICES.values()):
        rules = dict(zip(CHOICES, values, strict=True))
        bad = quarrelling(rules)
        outcomes[not bad] += 1
        if not bad:
            made(**rules)
            continue
        with pytest.raises(ValueError, match="do not go together") as error:
            made(**rules)
        assert any(all(written(name, rules[name]) in str(error.value) for name in pair) for pair in bad)
    assert min(outcomes.values()) > 100


@pytest.mark.parametrize("name", ["merging", "local", "weighting", "moments", "outer", "codec", "robust"])
def test_an_unknown_name_is_refused_with_all_that_are_known(name):
    with pytest.raises(ValueError, match=f"rounds.{name} is 'magic'; use one of {', '.join(CHOICES[name])}"):
        Recipe(**{name: "magic"})


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *itertools.product(["top_share"], [0.0, -1.0, 1.01, math.nan, math.inf]),
        *itertools.product(["proximal"], [0.0, -1.0, 101.0, math.nan, math.inf]),
        *itertools.product(["outer_learning_rate"], [0.0, -1.0, 101.0, math.nan, math.inf]),
        *itertools.product(["outer_momentum"], [-0.1, 1.0, math.nan, math.inf]),
    ],
)
def test_a_value_out_of_range_is_named(name, wrong):
    with pytest.raises(ValueError, match=f"rounds.{name} is {wrong}"):
        Recipe(**{name: wrong})


def test_adam_takes_small_rates_only():
    assert Recipe(outer="adam", outer_learning_rate=0.1).outer_learning_rate == 0.1
    with pytest.raises(ValueError, match=r"rounds.outer_learning_rate is 0\.7; Adam"):
        Recipe(outer="adam")


def test_the_digest_differs_for_every_field_and_is_the_same_for_equal_recipes():
    assert CHANGED.keys() == {field.name for field in fields(Recipe)}
    digests = {Recipe(weighting="equal").digest, Recipe().digest}
    for name, value in CHANGED.items():
        rules = {"weighting": "equal"} if name == "robust" else {}
        digests.add(Recipe(**(rules | {name: value})).digest)
        assert Recipe(**(rules | {name: value})).digest == Recipe(**(rules | {name: value})).digest
    assert len(digests) == 2 + len(CHANGED)
    assert all(len(digest) == 16 for digest in digests)
