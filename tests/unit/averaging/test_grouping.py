"""Groups of runs that are too large for one: all members agree on them, and everybody's change reaches everybody."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from averaging.grouping import Meeting, meeting_of, rounds_to_mix
from blocks.spans import Span
from peers.network import PeerId


def peers(count: int, span: Span = Span(0, 4)) -> dict[PeerId, Span]:
    return {PeerId(f"peer{index:04}"): span for index in range(count)}


def meetings(spans, number: int, group_peers: int) -> dict[PeerId, Meeting]:
    return {peer: meeting_of(peer, spans, number, group_peers) for peer in spans}


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


def spread_after(values: dict[PeerId, float], spans, rounds: range, group_peers: int) -> float:
    for number in rounds:
        groups = {meeting.label: meeting.members for meeting in meetings(spans, number, group_peers).values()}
        for members in groups.values():
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
            for members in {meeting.members for meeting in meetings(spans, number, 16).values()}:
                own = [peer for peer in members if peer in values]
                if own:
                    values |= dict.fromkeys(own, sum(values[peer] for peer in own) / len(own))
        assert max(values.values()) - min(values.values()) < 0.02
