"""Groups of runs that are too large for one: all members agree on them, and everybody's change reaches everybody."""

from __future__ import annotations

import random
from collections.abc import Collection

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from averaging.config import MAX_GROUP_PEERS
from averaging.grouping import Meeting, meeting_of, rounds_to_mix
from blocks.spans import Span
from peers.network import PeerId


def peers(count: int, span: Span = Span(0, 4)) -> dict[PeerId, Span]:
    return {PeerId(f"peer{index:04}"): span for index in range(count)}


def meetings(
    spans, number: int, group_peers: int, behind_nat: Collection[PeerId] = frozenset()
) -> dict[PeerId, Meeting]:
    return {peer: meeting_of(peer, spans, number, group_peers, behind_nat) for peer in spans}


def groups_of(
    spans, number: int, group_peers: int, behind_nat: Collection[PeerId] = frozenset()
) -> list[frozenset[PeerId]]:
    """All groups of a round, each asked of one member: that the others agree is tested on its own."""
    groups, left = [], set(spans)
    while left:
        groups.append(meeting_of(min(left), spans, number, group_peers, behind_nat).members)
        left -= groups[-1]
    return groups


spans_of_a_swarm = st.lists(
    st.tuples(st.integers(0, 11), st.integers(1, 6)).map(lambda pair: Span(pair[0], pair[0] + pair[1])), min_size=1,
    max_size=80,
).map(lambda found: {PeerId(f"peer{index:02}"): span for index, span in enumerate(found)})  # fmt: skip


@given(spans_of_a_swarm, st.integers(1, 50), st.integers(2, 16))
def test_all_members_of_a_group_agree_on_it_and_none_is_too_large(spans, number, group_peers):
    found = meetings(spans, number, group_peers)
    labels: dict = {}
    for peer, meeting in found.items():
        assert peer in meeting.members
        assert len(meeting.members) <= group_peers
        assert set(meeting.label) <= {"0", "1"}
        for member in meeting.members:
            assert found[member] == meeting
        assert labels.setdefault(meeting.label, meeting.members) == meeting.members


@given(spans_of_a_swarm, st.integers(1, 50))
def test_where_one_group_holds_all_they_meet_every_round_and_need_no_mixing(spans, number):
    for meeting in meetings(spans, number, 80).values():
        assert not meeting.is_mixing
        assert meeting.members == set(spans)
        assert meeting.label == ""


def test_peers_that_share_no_block_have_rounds_for_themselves_once_there_are_many():
    spans = peers(10, Span(0, 4)) | {PeerId(f"other{index}"): Span(4, 9) for index in range(10)}
    found = meetings(spans, 1, 16)
    assert {len(meeting.members) for meeting in found.values()} == {10}
    assert len({meeting.label for meeting in found.values()}) == 2
    assert not any(meeting.is_mixing for meeting in found.values())


def test_two_large_parts_that_share_no_block_have_groups_of_their_own_names():
    found = meetings(peers(20, Span(0, 4)) | {PeerId(f"back{index:02}"): Span(4, 9) for index in range(20)}, 1, 16)
    assert len({meeting.label for meeting in found.values()}) == len({meeting.members for meeting in found.values()})


def spread_after(
    values: dict[PeerId, float], spans, rounds: range, group_peers: int, behind_nat: Collection[PeerId] = frozenset()
) -> float:
    for number in rounds:
        for members in groups_of(spans, number, group_peers, behind_nat):
            if not members - set(behind_nat):
                continue  # nobody there can be called
            mean = sum(values[peer] for peer in members) / len(members)
            values |= dict.fromkeys(members, mean)
    return max(values.values()) - min(values.values())


@pytest.mark.parametrize(
    ("count", "group_peers", "rounds"), [(16, 16, 1), (17, 16, 2), (256, 16, 2), (64, 4, 3), (1000, 16, 3)]
)
def test_the_number_of_rounds_is_logarithmic(count, group_peers, rounds):
    assert rounds_to_mix(count, group_peers) == rounds


@pytest.mark.parametrize(("count", "group_peers"), [(256, 16), (64, 8), (64, 4)])
def test_on_a_full_grid_all_are_equal_after_one_turn(count, group_peers):
    spans = peers(count)
    values = {peer: random.Random(str(peer)).uniform(-1, 1) for peer in spans}
    turns = rounds_to_mix(count, group_peers)
    assert spread_after(values, spans, range(turns, 2 * turns), group_peers) < 1e-12


@pytest.mark.parametrize("count", [17, 40, 150])
def test_on_a_ragged_grid_a_few_turns_leave_almost_no_difference(count):
    spans = peers(count)
    values = {peer: random.Random(str(peer)).uniform(-1, 1) for peer in spans}
    turns = rounds_to_mix(count, 16)
    first = max(values.values()) - min(values.values())
    assert spread_after(values, spans, range(1, 1 + 4 * turns), 16) < 0.01 * first


@pytest.mark.parametrize("seed", range(3))
def test_holders_of_one_block_mix_even_where_few_hold_it(seed):
    dice = random.Random(seed)
    starts = [dice.randrange(0, 24) for _ in range(60)]
    spans = {PeerId(f"peer{index:02}"): Span(start, start + dice.randrange(4, 9)) for index, start in enumerate(starts)}
    for block in (4, 12, 20):
        holders = [peer for peer, span in spans.items() if block in span]
        values = {peer: dice.uniform(-1, 1) for peer in holders}
        for number in range(1, 60):
            for members in groups_of(spans, number, 16):
                own = [peer for peer in members if peer in values]
                if own:
                    values |= dict.fromkeys(own, sum(values[peer] for peer in own) / len(own))
        assert max(values.values()) - min(values.values()) < 0.02


@settings(max_examples=50, deadline=None)
@given(spans_of_a_swarm, st.integers(1, 50), st.integers(2, 16), st.data())
def test_members_agree_on_a_group_also_where_some_are_behind_nat(spans, number, group_peers, data):
    behind_nat = data.draw(st.sets(st.sampled_from(sorted(spans))))
    found = meetings(spans, number, group_peers, behind_nat)
    labels: dict = {}
    for peer, meeting in found.items():
        assert peer in meeting.members
        assert len(meeting.members) <= max(group_peers, MAX_GROUP_PEERS if behind_nat else 0)
        assert all(found[member] == meeting for member in meeting.members)
        assert labels.setdefault(meeting.label, meeting.members) == meeting.members


@settings(max_examples=50, deadline=None)
@given(st.integers(17, 120), st.integers(1, 50), st.data())
def test_each_group_has_a_member_that_can_be_called_where_there_are_any(count, number, data):
    spans = peers(count)
    num_reached = data.draw(st.integers(-(-count // MAX_GROUP_PEERS) * 2, count))
    reached = set(data.draw(st.permutations(sorted(spans)))[:num_reached])
    groups = groups_of(spans, number, 16, spans.keys() - reached)
    assert all(members & reached for members in groups)
    assert len(groups) <= num_reached
    if num_reached >= 2 * count / 16 + 2:
        assert max(map(len, groups)) <= 16, "there were enough for groups of the usual size"


@pytest.mark.parametrize("place", ["first", "last", "everywhere"])
def test_a_few_who_can_be_called_make_all_others_mix(place):
    spans = peers(100)
    names = sorted(spans)
    reached = {"first": names[:10], "last": names[-10:], "everywhere": names[5::10]}[place]
    values = {peer: random.Random(str(peer)).uniform(-1, 1) for peer in spans}
    first = max(values.values()) - min(values.values())
    assert spread_after(values, spans, range(1, 9), 16, spans.keys() - set(reached)) < 0.01 * first


def test_too_few_for_all_serve_others_in_each_round():
    spans = peers(200)
    reached = set(sorted(spans)[:2])
    met: set[PeerId] = set()
    for number in range(1, 13):
        groups = groups_of(spans, number, 16, spans.keys() - reached)
        met.update(*(members for members in groups if members & reached))
    assert met == spans.keys()


def test_where_nobody_can_be_called_the_groups_are_as_without_nat():
    spans = peers(40)
    assert groups_of(spans, 3, 16, spans) == groups_of(spans, 3, 16)


def test_a_part_of_the_model_that_only_peers_behind_nat_hold_meets_with_one_that_can_be_called():
    front, back = peers(12, Span(0, 4)), {PeerId(f"back{index:02}"): Span(4, 9) for index in range(10)}
    [members] = groups_of(front | back, 1, 16, back)
    assert members == front.keys() | back.keys()
    assert not any(meeting.is_mixing for meeting in meetings(front | back, 1, 16, back).values())
    many = peers(40, Span(0, 4))
    found = meetings(many | back, 1, 16, back)
    assert all(meeting.is_mixing and meeting.members & many.keys() for meeting in found.values())
    crowd = {PeerId(f"back{index:02}"): Span(4, 9) for index in range(60)}
    apart = groups_of(front | crowd, 1, 16, crowd)
    assert frozenset(front) in apart, "more than one group can hold must not break up who could meet without them"
