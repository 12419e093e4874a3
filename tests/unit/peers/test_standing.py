"""What records say about hosts, as placement reads it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from blocks.spans import Span
from peers.placing.standing import MAX_LOADING_SECONDS, Standing, standings_of
from peers.records import PeerRecord
from tests.fakes import peer_record
from tests.unit.peers.standings import host

NOW = 5000.0


def record(peer: str, span: Span = Span(2, 6), **changes: object) -> PeerRecord:
    return replace(peer_record(peer, span), **{"capacity": 8, "since": NOW - 10, **changes})  # type: ignore[arg-type]


def only(*records: PeerRecord) -> Standing:
    (found,) = standings_of(records, 30, NOW)
    return found


def test_a_host_stands_where_its_record_says_at_the_speed_of_both_passes() -> None:
    one = only(record("a", tokens_per_second=100.0, backward_tokens_per_second=25.0, pinned=True, moved=True))
    assert one == host("a", Span(2, 6), 4 * 20.0, 8, pinned=True, since=NOW - 10, moved=True)
    assert only(record("a", tokens_per_second=100.0, backward_tokens_per_second=0.0)).block_rate == 400.0


def test_who_says_no_capacity_stays_where_it_is() -> None:
    assert only(record("a", capacity=0)).pinned
    assert not only(record("a", capacity=1)).pinned


def test_a_promise_counts_until_it_is_too_old() -> None:
    moving = record("a", moves_to=Span(8, 12))
    assert only(moving).goal == Span(8, 12)
    assert only(moving).span == Span(2, 6)
    stale = replace(moving, since=NOW - MAX_LOADING_SECONDS - 1)
    assert only(stale).goal == Span(2, 6)
    from_the_future = replace(moving, since=NOW + 60)
    assert only(from_the_future).goal == Span(2, 6)
    assert only(from_the_future).since == NOW


def test_who_is_loading_serves_nothing_and_who_has_left_is_nowhere() -> None:
    loading = record("a", roles=(), moves_to=Span(8, 12))
    assert only(loading).goal == Span(8, 12)
    assert not only(loading).serving
    gone = [record("a", roles=()), replace(loading, since=0.0), record("b", roles=("trainer",))]
    assert standings_of(gone, 30, NOW) == []


def test_spans_beyond_the_model_are_cut_or_dropped() -> None:
    assert only(record("a", Span(28, 40))).span == Span(28, 30)
    assert standings_of([record("a", Span(30, 40)), record("b", Span(40, 41), moves_to=Span(33, 34))], 30, NOW) == []
    assert only(record("a", moves_to=Span(33, 34))).goal == Span(2, 6)


def test_speeds_that_are_unknown_or_made_up_are_read_next_to_the_others() -> None:
    found = {
        one.peer: one.block_rate
        for one in standings_of(
            [
                *(record(name, backward_tokens_per_second=0.0) for name in "abc"),
                record("new", tokens_per_second=0.0),
                record("liar", tokens_per_second=1e9, backward_tokens_per_second=1e9),
            ],
            30,
            NOW,
        )
    }
    assert found == {"a": 400.0, "b": 400.0, "c": 400.0, "new": 400.0, "liar": 400_000.0}
    assert only(record("a", tokens_per_second=0.0)).block_rate == 1.0


def test_standings_are_in_one_order_whatever_the_records_are() -> None:
    records = [record(name) for name in "cab"]
    assert [one.peer for one in standings_of(records, 30, NOW)] == ["a", "b", "c"]


@pytest.mark.parametrize(("rate", "capacity"), [(0.0, 1), (float("inf"), 1), (float("nan"), 1), (-1.0, 1), (1.0, 0)])
def test_a_standing_that_cannot_be_is_refused(rate: float, capacity: int) -> None:
    with pytest.raises(ValueError, match="use a finite rate above 0"):
        host("a", Span(0, 1), rate, capacity)
