"""Who reduces how much of a class, by what members say of their lines."""

from __future__ import annotations

import math

import pytest

from averaging import planning
from peers.network import PeerId
from tests.unit.averaging.contributions import CONFIG, bring


def test_reducers_work_in_proportion_to_bandwidth_and_peers_behind_nat_do_not():
    group = [
        bring("a", [0], megabits_per_second=300.0),
        bring("b", [0], megabits_per_second=100.0),
        bring("c", [0], megabits_per_second=1000.0, client_mode=True),
        bring("d", [0], megabits_per_second=math.nan),
    ]
    assert planning.fractions([PeerId(name) for name in "abcd"], group) == (0.5, 10 / 60, 0.0, 20 / 60)


def test_who_keeps_its_bandwidth_low_reduces_less_than_those_who_do_not_know_theirs():
    group = [bring("a", [0], megabits_per_second=20.0), bring("b", [0])]
    assert planning.fractions([PeerId("a"), PeerId("b")], group) == (20 / 120, 100 / 120)


@pytest.mark.parametrize("rule", ["clip", "trimmed", "krum"])
@pytest.mark.parametrize("claims", [{"h": 1e6}, {"h": 1e6, "a": 0.0}, {"g": 1e5, "h": 1e6}])
def test_under_a_robust_mean_no_claim_of_bandwidth_gains_more_than_two_usual_parts(rule, claims):
    names = [PeerId(name) for name in "abcdefgh"]
    group = [bring(name, [0], megabits_per_second=claims.get(name, 50.0)) for name in names]
    found = planning.fractions(names, group, rule)
    assert sum(found) == pytest.approx(1.0)
    assert max(found) < 2 / 8 + 1e-9
    assert min(found) > 1 / 16
    assert max(planning.fractions(names, group)) > 0.5, "whoever trusts all of them uses a fast line"


def test_under_a_robust_mean_unlike_lines_still_count_and_nobody_reachable_is_nobody():
    group = [bring("a", [0], megabits_per_second=100.0), bring("b", [0], megabits_per_second=50.0),
             bring("c", [0], megabits_per_second=60.0)]  # fmt: skip
    assert planning.fractions([PeerId(name) for name in "abc"], group, "clip") == (100 / 210, 50 / 210, 60 / 210)
    hidden = [bring("a", [0], client_mode=True)]
    assert planning.fractions([PeerId("a")], hidden, "clip") == (0.0,)


@pytest.mark.parametrize(
    ("links", "expected"),
    [
        ([0.0, 0.0], CONFIG.part_bytes),  # nobody knows its link
        ([100.0, 0.0], CONFIG.part_bytes),
        ([0.8, 100.0], 100_000),
        ([1e-3, 100.0], 2**14),  # not smaller, or headers would be what is sent
        ([math.nan, -1.0, math.inf], CONFIG.part_bytes),
    ],
)
def test_parts_are_no_larger_than_a_second_of_the_slowest_link_that_is_known(links: list[float], expected: int):
    group = [bring(name, [0], megabits_per_second=link) for name, link in zip("abc", links, strict=False)]
    assert planning.part_bytes(group, CONFIG) == expected
