"""Which state a unit's holders go on from, where they hold several."""

from __future__ import annotations

import pytest

from averaging import planning
from averaging.exchange import Version
from peers.network import PeerId
from tests.unit.averaging.contributions import COMMON, CONFIG, OLD, STRANGE, UNIT, group_of, on


def test_the_newest_version_wins_by_round_then_weight_then_digest():
    versions = [
        Version(number=2, weight=1.0, digest=b"a"),
        Version(number=3, weight=1.0, digest=b"a"),
        Version(number=3, weight=2.0, digest=b"a"),
        Version(number=3, weight=2.0, digest=b"b"),
    ]
    assert max(versions) == planning.agreed_version(versions) == planning.agreed_version(versions[::-1]) == versions[3]
    assert sorted([versions[place] for place in (2, 0, 3, 1)]) == versions


@pytest.mark.parametrize("odd", [OLD, STRANGE, Version()], ids=["older", "newer", "first"])
def test_a_lone_holder_of_another_state_neither_pulls_the_others_back_nor_drags_them(odd):
    group = group_of(on("a", COMMON), on("b", COMMON), on("c", odd))
    for peer in "ab":
        plan = planning.plan(group, PeerId(peer), CONFIG)
        assert [entry.holders for entry in plan.classes] == [("a", "b")]
        assert [(entry.peer, entry.unit) for entry in plan.left_out] == [("c", UNIT)]
        assert not plan.stale
    lone = planning.plan(group, PeerId("c"), CONFIG)
    assert lone.stale == {UNIT}
    assert lone.kept.keys() == {UNIT}


@pytest.mark.parametrize("number", [5, 6, 10**6])
def test_a_state_of_a_round_that_is_not_over_counts_for_nothing_even_against_one_other(number):
    future = Version(number=number, weight=1e9, digest=b"z")
    group = group_of(on("a", COMMON), on("c", future))
    plan = planning.plan(group, PeerId("a"), CONFIG)
    assert plan.alone == (UNIT,)
    assert plan.left_out[0].reason == f"its state is of round {number}, which is not over"
    lone = planning.plan(group, PeerId("c"), CONFIG)
    assert "not over" in lone.kept[UNIT]
    assert not lone.stale


def test_where_no_state_has_most_of_the_holders_the_newest_is_taken_and_the_others_fetch_it():
    group = group_of(on("a", OLD), on("b", COMMON))
    assert planning.plan(group, PeerId("a"), CONFIG).stale == {UNIT}
    assert planning.plan(group, PeerId("b"), CONFIG).alone == (UNIT,)


def test_a_lone_holder_does_not_drag_two_who_agree_only_because_a_fourth_lags_behind():
    assert planning.agreed_version([COMMON, COMMON, OLD, STRANGE]) == COMMON
