"""The rules of a round, for any group."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from averaging import rounds
from averaging.config import AveragingConfig
from averaging.exchange import Contribution, Group, UnitClass, Vote
from blocks.spans import unit_of
from peers.network import PeerId

CONFIG = AveragingConfig(round_samples=100)
PEERS = [PeerId(f"peer{index}") for index in range(6)]


def bring(peer: str, blocks, weight=1.0, **changes) -> Contribution:
    weights = {unit_of("default", block): weight for block in blocks}
    fields = {"peer": PeerId(peer), "number": 5, "layout": "same", "weights": weights}
    return Contribution(**(fields | changes))


def group_of(*contributions: Contribution) -> Group:
    return Group(group_id=b"group", contributions=contributions)


weights = st.one_of(
    st.floats(0, 1e6), st.sampled_from([0.0, -1.0, math.nan, math.inf, -math.inf, 1e30]), st.floats(allow_nan=True)
)
contribution = st.builds(
    lambda number, layout, blocks, client, speed: Contribution(
        peer=PeerId("x"),
        number=number,
        layout=layout,
        weights={unit_of("default", block): weight for block, weight in blocks.items()},
        megabits_per_second=speed,
        client_mode=client,
    ),
    st.sampled_from([5, 5, 5, 4, 6]),
    st.sampled_from(["same", "same", "same", "other"]),
    st.dictionaries(st.integers(0, 5), weights, max_size=6),
    st.booleans(),
    st.one_of(st.floats(allow_nan=True), st.just(0.0), st.floats(1, 1000)),
)
groups = st.lists(contribution, min_size=1, max_size=6).map(
    lambda found: group_of(*[replace(entry, peer=PEERS[index]) for index, entry in enumerate(found)])
)


@given(groups, st.randoms())
def test_all_members_make_the_same_classes_whatever_the_order_and_each_unit_is_in_one_place(group, rng):
    shuffled = list(group.contributions)
    rng.shuffle(shuffled)
    plans = {entry.peer: rounds.plan(group, entry.peer, CONFIG) for entry in group.contributions}
    for entry in group.contributions:
        plan = plans[entry.peer]
        assert plan == rounds.plan(replace(group, contributions=tuple(shuffled)), entry.peer, CONFIG)
        in_classes = [unit for unit_class in plan.classes for unit in unit_class.units]
        assert sorted([*in_classes, *plan.alone, *plan.kept]) == sorted(entry.weights)
        for unit_class in plan.classes:
            assert entry.peer in unit_class.holders
            assert len(unit_class.holders) > 1
            for holder in unit_class.holders:
                assert unit_class in plans[holder].classes
            for unit in unit_class.units:
                shares = [plans[holder].shares[unit] for holder in unit_class.holders]
                assert all(0 <= share <= 1 for share in shares)
                assert math.isclose(sum(shares), 1, rel_tol=1e-9)
            portions = rounds.fractions(unit_class.holders, group.contributions)
            assert math.isclose(sum(portions), 1, rel_tol=1e-9)
            assert all(portion >= 0 for portion in portions)


@given(groups)
def test_class_ids_differ_between_classes_and_between_groups(group):
    ids = {}
    for group_id in (b"one", b"two"):
        for entry in group.contributions:
            for unit_class in rounds.plan(replace(group, group_id=group_id), entry.peer, CONFIG).classes:
                key = (group_id, unit_class.holders)
                assert ids.setdefault(unit_class.class_id, key) == key


def test_units_with_the_same_holders_share_a_class_and_a_single_holder_needs_no_traffic():
    plan = rounds.plan(group_of(bring("a", range(5)), bring("b", range(1, 3)), bring("c", range(2, 4))), "a", CONFIG)
    assert {entry.holders: len(entry.units) for entry in plan.classes} == {
        ("a", "b"): 1,
        ("a", "b", "c"): 1,
        ("a", "c"): 1,
    }
    assert plan.alone == (unit_of("default", 0), unit_of("default", 4))


def test_shares_follow_the_signed_weights_per_unit():
    ann = bring("a", [], weights={unit_of("default", 0): 1.0, unit_of("default", 1): 5.0})
    bob = bring("b", [], weights={unit_of("default", 0): 3.0, unit_of("default", 1): 0.0})
    plan = rounds.plan(group_of(ann, bob), "a", CONFIG)
    assert plan.shares == {unit_of("default", 0): 0.25, unit_of("default", 1): 1.0}
    assert plan.totals == {unit_of("default", 0): 4.0, unit_of("default", 1): 5.0}


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, 1e12])
def test_a_weight_that_cannot_be_right_is_refused_with_a_reason_and_the_round_goes_on(weight):
    group = group_of(bring("a", [0]), bring("b", [0]), bring("c", [0], weight))
    plan = rounds.plan(group, "a", CONFIG)
    assert plan.classes[0].holders == ("a", "b")
    assert [(entry.peer, "refused" in entry.reason) for entry in plan.left_out] == [("c", True)]
    assert "refused" in rounds.plan(group, "c", CONFIG).kept[unit_of("default", 0)]


def test_a_holder_without_samples_takes_the_mean_and_adds_nothing():
    group = group_of(bring("a", [0], 2.0), bring("b", [0], 0.0))
    plan = rounds.plan(group, "b", CONFIG)
    assert plan.classes[0].holders == ("a", "b")
    assert plan.shares[unit_of("default", 0)] == 0
    assert [(entry.peer, entry.unit) for entry in plan.left_out] == [("b", unit_of("default", 0))]


def test_a_class_without_any_sample_is_left_out():
    plan = rounds.plan(group_of(bring("a", [0], 0.0), bring("b", [0], 0.0)), "a", CONFIG)
    assert not plan.classes
    assert "no holder" in plan.kept[unit_of("default", 0)]


def test_a_class_that_nobody_can_reduce_is_left_out():
    plan = rounds.plan(group_of(bring("a", [0], client_mode=True), bring("b", [0], client_mode=True)), "a", CONFIG)
    assert not plan.classes
    assert "NAT" in plan.kept[unit_of("default", 0)]


def test_other_settings_and_older_rounds_are_left_out_with_a_reason():
    group = group_of(bring("a", [0]), bring("b", [0]), bring("c", [0], layout="other"), bring("d", [0], number=4))
    plan = rounds.plan(group, "a", CONFIG)
    assert plan.classes[0].holders == ("a", "b")
    assert {entry.peer: entry.reason for entry in plan.left_out} == {
        "c": "its adapter settings differ",
        "d": "it is at round 4, this is round 5",
    }
    assert rounds.plan(group, "d", CONFIG).behind


def test_one_peer_from_an_absurd_future_stops_nobody_but_a_majority_is_believed():
    far = {"number": 5 + CONFIG.max_rounds_ahead + 1}
    alone = group_of(bring("a", [0]), bring("b", [0]), bring("c", [0], **far))
    assert rounds.plan(alone, "a", CONFIG).classes[0].holders == ("a", "b")
    most = group_of(bring("a", [0]), bring("b", [0], **far), bring("c", [0], **far))
    assert rounds.plan(most, "a", CONFIG).behind


def test_reducers_work_in_proportion_to_bandwidth_and_peers_behind_nat_do_not():
    group = [
        bring("a", [0], megabits_per_second=30.0),
        bring("b", [0], megabits_per_second=10.0),
        bring("c", [0], megabits_per_second=1000.0, client_mode=True),
        bring("d", [0], megabits_per_second=math.nan),
    ]
    assert rounds.fractions([PeerId(name) for name in "abcd"], group) == (0.5, 10 / 60, 0.0, 20 / 60)


CLASS = UnitClass(class_id=b"class", holders=(PeerId("a"), PeerId("b")), units=(unit_of("default", 0),))


@given(
    st.dictionaries(
        st.sampled_from(["a", "b"]),
        st.builds(
            Vote,
            class_id=st.sampled_from([b"class", b"class", b"other"]),
            complete=st.booleans(),
            digest=st.sampled_from([b"x", b"y"]),
        ),
    )
)
def test_a_class_applies_only_when_all_are_complete_and_equal(votes):
    decision = rounds.decide(CLASS, votes, PeerId("a"))
    unanimous = (
        votes.keys() == {"a", "b"}
        and all(vote.complete and vote.class_id == b"class" for vote in votes.values())
        and votes["a"].digest == votes["b"].digest
    )
    assert isinstance(decision, rounds.Applied) == unanimous
    if unanimous:
        assert decision.digest == votes["a"].digest


def test_the_newest_version_wins_by_round_then_weight_then_digest():
    versions = [
        rounds.Version(number=2, weight=1.0, digest=b"a"),
        rounds.Version(number=3, weight=1.0, digest=b"a"),
        rounds.Version(number=3, weight=2.0, digest=b"a"),
        rounds.Version(number=3, weight=2.0, digest=b"b"),
        rounds.Version(number=9, weight=math.nan, digest=b"z"),
    ]
    assert rounds.newest(versions) == versions[3]
    assert rounds.newest([]) is None


def test_a_round_is_proposed_when_enough_samples_are_in_and_not_twice():
    progress = [
        rounds.PeerProgress(peer=PeerId("a"), number=5, samples=60),
        rounds.PeerProgress(peer=PeerId("b"), number=5, samples=39),
        rounds.PeerProgress(peer=PeerId("c"), number=4, samples=1000),
        rounds.PeerProgress(peer=PeerId("d"), number=5, samples=math.inf),
    ]
    assert rounds.should_begin(progress, 5, CONFIG, now=1000.0) is None
    enough = [*progress, rounds.PeerProgress(peer=PeerId("e"), number=5, samples=1)]
    moment = rounds.should_begin(enough, 5, CONFIG, now=1000.0)
    assert moment == 1000.0 + CONFIG.lead_seconds
    proposed = [*enough, rounds.PeerProgress(peer=PeerId("f"), number=5, samples=1, proposed_at=moment)]
    assert rounds.should_begin(proposed, 5, CONFIG, now=1000.5) is None


def test_the_earliest_valid_proposal_wins_and_absurd_ones_are_ignored():
    proposals = [
        rounds.PeerProgress(peer=PeerId("a"), number=5, samples=1, proposed_at=1003.0),
        rounds.PeerProgress(peer=PeerId("b"), number=5, samples=1, proposed_at=1002.0),
        rounds.PeerProgress(peer=PeerId("c"), number=4, samples=1, proposed_at=1001.0),
        rounds.PeerProgress(peer=PeerId("d"), number=5, samples=1, proposed_at=-1e9),
        rounds.PeerProgress(peer=PeerId("e"), number=5, samples=1, proposed_at=math.nan),
        rounds.PeerProgress(peer=PeerId("f"), number=5, samples=1, proposed_at=1e12),
    ]
    assert rounds.agreed_start(proposals, 5, now=1000.0) == 1002.0
    assert rounds.agreed_start(proposals[2:], 5, now=1000.0) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [("round_samples", 0), ("min_peers", 1), ("vote_seconds", 0), ("request_seconds", 0.9), ("part_bytes", 1)],
)
def test_a_setting_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=f"averaging.{field}"):
        AveragingConfig(**{field: value})
