"""Who averages what with whom, for any group: the same to all its members."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from averaging import planning
from averaging.exchange import Brought, Contribution, Group, Version
from averaging.recipe import Recipe
from averaging.robust import MIN_HOLDERS
from blocks.spans import unit_of
from peers.network import PeerId
from tests.unit.averaging.contributions import COMMON, CONFIG, OLD, PEERS, STRANGE, UNIT, bring, group_of, on

RECIPES = [
    Recipe(),
    Recipe(weighting="tokens"),
    Recipe(local="fednova"),
    *[Recipe(weighting="equal", robust=rule) for rule in ("clip", "trimmed", "krum")],
]

ORDINARY = [
    Brought(samples=samples, tokens=tokens, steps=steps, version=COMMON)
    for samples, tokens, steps in [(1.0, 9.0, 1), (2.5, 1e4, 7), (0.1, 3.0, 2), (512.0, 1e5, 50)]
]
weights = st.sampled_from([0.0, 0.0, 1e9, 5e-324, -1.0, math.nan, math.inf, -math.inf, 1e30]) | st.floats()
oddities = st.one_of(
    st.tuples(st.sampled_from(["samples", "tokens"]), weights),
    st.tuples(st.just("steps"), st.sampled_from([0, -1, 10**9, 10**12])),
    st.tuples(st.just("version"), st.sampled_from([OLD, OLD, STRANGE, STRANGE, Version(), Version(number=5)])),
    st.tuples(st.just("number"), st.sampled_from([4, 6, 900])),
    st.tuples(st.just("layout"), st.just("other")),
    st.tuples(st.just("client_mode"), st.just(True)),
    st.tuples(st.just("megabits_per_second"), st.floats() | st.floats(1, 1000)),
)


@st.composite
def groups(draw) -> Group:
    """Peers as they should be, but for up to six things that are odd about one of them, and one whom some distrust."""
    num_peers = draw(st.integers(1, 6))
    accusers, accused = draw(st.sets(st.integers(0, 5))), draw(st.sampled_from(PEERS[:num_peers]))
    members = []
    for place, peer in enumerate(PEERS[:num_peers]):
        units = {
            unit_of("default", block): draw(st.sampled_from(ORDINARY)) for block in range(draw(st.integers(0, 2)), 3)
        }
        distrusts = frozenset({accused} if place in accusers else ())
        members.append(Contribution(peer=peer, number=5, layout="same", units=units, distrusts=distrusts))
    for name, value in draw(st.lists(oddities, max_size=6)):
        place = draw(st.integers(0, num_peers - 1))
        member = members[place]
        if hasattr(member, name):
            members[place] = replace(member, **{name: value})
        else:
            unit = draw(st.sampled_from(sorted(member.units)))
            odd = replace(member.units[unit], **{name: value})
            members[place] = replace(member, units={**member.units, unit: odd})
    return group_of(*members)


configs = st.sampled_from(RECIPES).map(lambda recipe: replace(CONFIG, recipe=recipe))


def distrusted(group: Group) -> set[PeerId]:
    """Counted anew, the slow way."""
    found = set()
    for peer in [entry.peer for entry in group.contributions]:
        words = [peer in entry.distrusts for entry in group.contributions if entry.peer != peer]
        if sum(words) > len(words) / 2:
            found.add(peer)
    return found


@given(groups(), configs, st.randoms())
def test_all_members_make_the_same_classes_whatever_the_order_and_each_unit_is_in_one_place(group, config, rng):
    shuffled = list(group.contributions)
    rng.shuffle(shuffled)
    plans = {entry.peer: planning.plan(group, entry.peer, config) for entry in group.contributions}
    client_mode = {entry.peer: entry.client_mode for entry in group.contributions}
    for entry in group.contributions:
        plan = plans[entry.peer]
        assert plan == planning.plan(replace(group, contributions=tuple(shuffled)), entry.peer, config)
        in_classes = [unit for unit_class in plan.classes for unit in unit_class.units]
        assert sorted([*in_classes, *plan.alone, *plan.kept]) == sorted(entry.units)
        helped = [unit for unit_class in plan.helped for unit in unit_class.units]
        assert sorted(plan.shares) == sorted(plan.samples) == sorted([*in_classes, *plan.alone, *helped])
        for unit_class in plan.helped:
            assert entry.peer in unit_class.helpers
            assert all(unit_class in plans[holder].classes for holder in unit_class.holders)
        assert plan.stale <= plan.kept.keys()
        for unit_class in plan.classes:
            assert entry.peer in unit_class.holders
            assert len(unit_class.holders) > 1
            for holder in unit_class.holders:
                assert unit_class in plans[holder].classes
            reachable = [holder for holder in unit_class.holders if not client_mode[holder]]
            assert not (reachable and unit_class.helpers)
            for helper in unit_class.helpers:
                assert unit_class in plans[helper].helped
                assert not client_mode[helper]
            portions = planning.fractions((*unit_class.holders, *unit_class.helpers), group.contributions)
            assert math.isclose(sum(portions), 1, rel_tol=1e-9)
            assert all(portion >= 0 for portion in portions)


@given(groups(), configs)
def test_shares_are_the_same_at_all_holders_and_sum_to_one_save_under_fednova(group, config):
    by_peer = {entry.peer: entry for entry in group.contributions}
    plans = {peer: planning.plan(group, peer, config) for peer in by_peer}
    for peer, plan in plans.items():
        holders_by_unit = {unit: one.holders for one in plan.classes for unit in one.units}
        holders_by_unit |= dict.fromkeys(plan.alone, (peer,))
        for unit, holders in holders_by_unit.items():
            shares = plan.shares[unit]
            assert len(shares) == len(holders)
            assert all(plans[holder].shares[unit] == shares for holder in holders)
            assert all(math.isfinite(share) and share >= 0 for share in shares)
            assert any(shares)
            samples = [by_peer[holder].units[unit].samples for holder in holders]
            assert all(share == 0 for share, count in zip(shares, samples, strict=True) if count == 0)
            assert plan.samples[unit] == math.fsum(samples)
            if config.recipe.local != "fednova":
                assert all(0 <= share <= 1 for share in shares)
                assert math.isclose(sum(shares), 1, rel_tol=1e-9)
            elif len(holders) == 1:
                assert shares == (1.0,)


@given(groups(), configs)
def test_only_holders_of_one_state_whom_the_others_trust_meet_and_enough_of_them_for_the_robust_rule(group, config):
    by_peer = {entry.peer: entry for entry in group.contributions}
    outcasts = distrusted(group)
    for peer, entry in by_peer.items():
        plan = planning.plan(group, peer, config)
        if peer in outcasts:
            assert plan.kept.keys() == entry.units.keys()
            assert not plan.behind
        elif not plan.behind:
            assert {one.peer for one in plan.left_out if "distrust" in one.reason} == outcasts
        for unit_class in plan.classes:
            assert not outcasts & set(unit_class.holders)
            assert {by_peer[holder].layout for holder in unit_class.holders} == {entry.layout}
            assert {by_peer[holder].number for holder in unit_class.holders} == {entry.number}
            if config.recipe.robust != "none":
                assert len({plan.shares[unit] for unit in unit_class.units}) == 1, "one say each in all its units"
            for unit in unit_class.units:
                assert len({by_peer[holder].units[unit].version for holder in unit_class.holders}) == 1
                assert entry.units[unit].version.number < entry.number
                assert sum(share > 0 for share in plan.shares[unit]) >= MIN_HOLDERS[config.recipe.robust]


@given(groups())
def test_class_ids_differ_between_classes_and_between_groups(group):
    ids = {}
    for group_id in (b"one", b"two"):
        for entry in group.contributions:
            for unit_class in planning.plan(replace(group, group_id=group_id), entry.peer, CONFIG).classes:
                key = (group_id, unit_class.holders)
                assert ids.setdefault(unit_class.class_id, key) == key


def test_a_class_is_named_for_its_units_too():
    one = planning.plan(group_of(bring("a", [0]), bring("b", [0])), "a", CONFIG).classes[0]
    two = planning.plan(group_of(bring("a", [0, 1]), bring("b", [0, 1])), "a", CONFIG).classes[0]
    assert one.holders == two.holders
    assert one.class_id != two.class_id


def test_who_is_not_in_the_group_cannot_plan_for_it():
    with pytest.raises(ValueError, match="peer z is not in the group"):
        planning.plan(group_of(bring("a", [0])), PeerId("z"), CONFIG)


def test_units_with_the_same_holders_share_a_class_and_a_single_holder_needs_no_traffic():
    group = group_of(bring("a", range(5)), bring("b", range(1, 3)), bring("c", range(2, 4)))
    plan = planning.plan(group, "a", CONFIG)
    assert {entry.holders: len(entry.units) for entry in plan.classes} == {
        ("a", "b"): 1,
        ("a", "b", "c"): 1,
        ("a", "c"): 1,
    }
    assert plan.alone == (unit_of("default", 0), unit_of("default", 4))


def test_shares_follow_the_signed_weights_per_unit():
    first, second = unit_of("default", 0), unit_of("default", 1)
    ann = bring("a", [], units={first: Brought(samples=1.0), second: Brought(samples=5.0)})
    bob = bring("b", [], units={first: Brought(samples=3.0), second: Brought(samples=0.0)})
    plan = planning.plan(group_of(ann, bob), "a", CONFIG)
    assert plan.shares == {first: (0.25, 0.75), second: (1.0, 0.0)}
    assert plan.samples == {first: 4.0, second: 5.0}
    assert planning.plan(group_of(ann, bob), "b", CONFIG).shares == plan.shares


@pytest.mark.parametrize(
    ("named", "value"),
    [*itertools.product(["samples", "tokens"], [-1.0, math.nan, math.inf, 1e12]), ("steps", -1), ("steps", 10**9 + 1)],
)
def test_a_weight_that_cannot_be_right_is_refused_with_a_reason_and_the_round_goes_on(named, value):
    strange = bring("c", [], units={UNIT: Brought(**({"samples": 1.0} | {named: value}))})
    group = group_of(bring("a", [0]), bring("b", [0]), strange)
    plan = planning.plan(group, "a", CONFIG)
    assert plan.classes[0].holders == ("a", "b")
    assert [(entry.peer, "refused" in entry.reason) for entry in plan.left_out] == [("c", True)]
    assert f"{value} " in plan.left_out[0].reason
    assert "refused" in planning.plan(group, "c", CONFIG).kept[UNIT]


def test_a_holder_without_samples_takes_the_mean_and_adds_nothing():
    group = group_of(bring("a", [0], 2.0), bring("b", [0], 0.0))
    plan = planning.plan(group, "b", CONFIG)
    assert plan.classes[0].holders == ("a", "b")
    assert plan.shares[UNIT] == (1.0, 0.0)
    assert [(entry.peer, entry.unit) for entry in plan.left_out] == [("b", UNIT)]


def test_a_class_without_any_sample_is_left_out():
    plan = planning.plan(group_of(bring("a", [0], 0.0), bring("b", [0], 0.0)), "a", CONFIG)
    assert not plan.classes
    assert "no holder" in plan.kept[UNIT]


def test_a_class_that_nobody_can_reduce_is_left_out():
    plan = planning.plan(group_of(bring("a", [0], client_mode=True), bring("b", [0], client_mode=True)), "a", CONFIG)
    assert not plan.classes
    assert "NAT" in plan.kept[UNIT]


def test_other_settings_and_older_rounds_are_left_out_with_a_reason():
    group = group_of(bring("a", [0]), bring("b", [0]), bring("c", [0], layout="other"), bring("d", [0], number=4))
    plan = planning.plan(group, "a", CONFIG)
    assert plan.classes[0].holders == ("a", "b")
    assert {entry.peer: entry.reason for entry in plan.left_out} == {
        "c": "its adapter or its rules of rounds differ",
        "d": "it is at round 4, this is round 5",
    }
    assert planning.plan(group, "d", CONFIG).behind


def test_one_peer_from_an_absurd_future_stops_nobody_but_a_majority_is_believed():
    far = {"number": 5 + CONFIG.max_rounds_ahead + 1}
    alone = group_of(bring("a", [0]), bring("b", [0]), bring("c", [0], **far))
    assert planning.plan(alone, "a", CONFIG).classes[0].holders == ("a", "b")
    most = group_of(bring("a", [0]), bring("b", [0], **far), bring("c", [0], **far))
    assert planning.plan(most, "a", CONFIG).behind


@pytest.mark.parametrize("ahead", [1, CONFIG.max_rounds_ahead])
def test_one_of_several_that_says_it_is_ahead_does_not_stop_the_others(ahead):
    newer = {"number": 5 + ahead}
    group = group_of(bring("a", [0]), bring("b", [0]), bring("c", [0], **newer))
    for peer in ("a", "b"):
        plan = planning.plan(group, PeerId(peer), CONFIG)
        assert plan.classes[0].holders == ("a", "b")
        assert [(entry.peer, entry.reason) for entry in plan.left_out] == [
            ("c", f"it is at round {5 + ahead}, this is round 5")
        ]
    pair = group_of(bring("a", [0]), bring("c", [0], **newer))
    assert planning.plan(pair, PeerId("a"), CONFIG).behind, "there is nobody else to ask"
    most = group_of(bring("a", [0]), bring("b", [0]), *[bring(peer, [0], **newer) for peer in "cd"])
    assert planning.plan(most, PeerId("a"), CONFIG).behind
    strangers = [bring(peer, [0], layout="other") for peer in "xyz"]
    assert planning.plan(group_of(*pair.contributions, *strangers), PeerId("a"), CONFIG).behind


def test_nobody_is_behind_peers_whom_most_distrust():
    false = frozenset({PeerId("c")})
    group = group_of(bring("a", [0], distrusts=false), bring("b", [0], distrusts=false), bring("c", [0], number=9))
    assert planning.plan(group, "a", CONFIG).classes[0].holders == ("a", "b")
    assert planning.plan(group, "b", CONFIG).left_out[0].reason == "most of the group distrust it"


def test_it_takes_most_of_the_others_to_shut_a_member_out():
    false = frozenset({PeerId("c")})
    for num_accusers, holders in ((1, ("a", "b", "c", "d")), (2, ("a", "b", "d"))):
        others = [bring(name, [0], distrusts=false if place < num_accusers else frozenset())
                  for place, name in enumerate("abd")]  # fmt: skip
        group = group_of(*others, bring("c", [0], distrusts=frozenset({PeerId("c")})))
        assert planning.plan(group, "a", CONFIG).classes[0].holders == holders
        assert ("distrust" in planning.plan(group, "c", CONFIG).kept.get(UNIT, "")) == (num_accusers == 2)


def test_of_two_members_neither_shuts_the_other_out():
    group = group_of(bring("a", [0], distrusts=frozenset({PeerId("b")})), bring("b", [0]))
    assert "most of the group distrust" not in planning.plan(group, "b", CONFIG).kept.get(UNIT, "")


def test_weights_are_samples_or_tokens_or_equal_and_who_saw_no_sample_has_none():
    entries = [
        Brought(samples=1.0, tokens=30.0),
        Brought(samples=3.0, tokens=10.0),
        Brought(samples=0.0, tokens=60.0),
    ]
    assert planning.shares_of(entries, Recipe(weighting="samples")) == (0.25, 0.75, 0.0)
    assert planning.shares_of(entries, Recipe(weighting="tokens")) == (0.75, 0.25, 0.0)
    assert planning.shares_of(entries, Recipe(weighting="equal")) == (0.5, 0.5, 0.0)
    for name in ("samples", "tokens", "equal"):
        assert planning.shares_of(entries[2:] * 2, Recipe(weighting=name)) == (0.0, 0.0)


@pytest.mark.parametrize("counts", [[(5, 3)], [(1, 2), (3, 40)], [(100, 1), (7, 7), (30, 12), (1, 50)]], ids=len)
def test_fednova_is_the_papers_formula(counts):
    """2007.07481, eq. 6: x' = x - tau_eff sum_i p_i d_i, with d_i = (x - x_i) / tau_i and tau_eff = sum_i p_i tau_i."""
    rng = random.Random(3)
    x, trained = rng.gauss(), [rng.gauss() for _ in counts]
    total = sum(samples for samples, _ in counts)
    tau_eff = sum(samples / total * steps for samples, steps in counts)
    mean_d = sum(n / total * (x - x_i) / tau for (n, tau), x_i in zip(counts, trained, strict=True))
    entries = [Brought(samples=float(samples), steps=steps) for samples, steps in counts]
    shares = planning.shares_of(entries, Recipe(local="fednova"))
    found = x + sum(share * (x_i - x) for share, x_i in zip(shares, trained, strict=True))
    assert found == pytest.approx(x - tau_eff * mean_d)


def test_fednova_with_equal_steps_is_the_weighted_mean_and_a_holder_without_a_step_counts_as_one_with_one():
    nova = Recipe(local="fednova")
    same = planning.shares_of([Brought(samples=1.0, steps=7), Brought(samples=3.0, steps=7)], nova)
    assert same == pytest.approx((0.25, 0.75))
    idle = planning.shares_of([Brought(samples=1.0, steps=0), Brought(samples=1.0, steps=4)], nova)
    assert idle == planning.shares_of([Brought(samples=1.0, steps=1), Brought(samples=1.0, steps=4)], nova)


def test_no_claim_of_steps_makes_the_others_updates_grow_without_bound():
    config = replace(CONFIG, recipe=Recipe(local="fednova"))
    claims = {UNIT: Brought(samples=10.0, steps=10**9)}
    group = group_of(bring("a", [0]), bring("b", [0]), bring("c", [0], units=claims))
    plan = planning.plan(group, PeerId("a"), config)
    assert plan.classes[0].holders == ("a", "b")
    assert plan.left_out[0].reason == "1000000000 local steps on 10 samples are refused"
    assert max(plan.shares[UNIT]) == 0.5


def test_a_state_that_claims_absurdly_many_samples_is_refused():
    forged = Version(number=COMMON.number, weight=1e300, digest=b"z")
    group = group_of(on("a", COMMON), on("c", forged))
    plan = planning.plan(group, PeerId("a"), CONFIG)
    assert plan.alone == (UNIT,)
    assert "refused" in plan.left_out[0].reason


@pytest.mark.parametrize(("rule", "least"), [("none", 1), ("clip", 3), ("trimmed", 4), ("krum", 5)])
def test_a_robust_rule_waits_for_as_many_updates_as_it_needs_and_splits_classes_by_say(rule, least):
    config = replace(CONFIG, recipe=Recipe(robust=rule, weighting="equal"))
    for num_active in range(1, 6):
        idle = [bring("y", [0], 0.0), bring("z", [0], 0.0)]
        group = group_of(*[bring(name, [0]) for name in "abcde"[:num_active]], *idle)
        plan = planning.plan(group, "a", config)
        assert bool(plan.classes) == (num_active >= least)
        if not plan.classes:
            assert plan.kept[UNIT] == f"{num_active} holders brought an update; the robust mean '{rule}' needs {least}"
    assert planning.plan(group_of(bring("a", [0])), "a", config).alone == (UNIT,)
    idle_in_one = bring("z", [], units={UNIT: Brought(samples=1.0), unit_of("default", 1): Brought(samples=0.0)})
    plan = planning.plan(group_of(*[bring(name, [0, 1]) for name in "abcde"], idle_in_one), "a", config)
    assert len(plan.classes) == (1 if rule == "none" else 2)
