from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks.errors import BadSpan
from blocks.spans import Span
from peers.network import PeerId
from peers.placing.placement import pick_among, pick_span, suited_length
from tests.fakes import peer_record
from tests.unit.peers.standings import host

ME = PeerId("QmME")
NOW = 1000.0


def test_a_gap_is_filled_before_anything_is_doubled() -> None:
    records = [peer_record("a", Span(0, 10)), peer_record("b", Span(20, 30))]
    assert pick_span(records, 30, 10, me=ME, now=NOW) == Span(10, 20)


def test_the_slower_half_is_strengthened() -> None:
    records = [peer_record("a", Span(0, 15), speed=900), peer_record("b", Span(15, 30), speed=100)]
    assert pick_span(records, 30, 15, me=ME, now=NOW) == Span(15, 30)


def test_more_blocks_than_the_model_has_means_all_of_them() -> None:
    assert pick_span([], 6, 100, me=ME, now=NOW) == Span(0, 6)
    with pytest.raises(BadSpan):
        pick_span([], 6, 0, me=ME, now=NOW)


def test_own_old_record_does_not_count() -> None:
    assert pick_span([peer_record(ME, Span(0, 3)), peer_record("b", Span(3, 6))], 6, 3, me=ME, now=NOW) == Span(0, 3)


def test_peers_that_start_at_the_same_moment_spread_over_equal_choices() -> None:
    chosen = {pick_span([], 40, 10, me=PeerId(f"Qm{i}"), now=NOW) for i in range(40)}
    assert chosen == {Span(0, 10), Span(10, 20), Span(20, 30), Span(30, 40)}


def test_what_another_newcomer_is_loading_is_not_picked_again() -> None:
    loading = replace(peer_record("b", Span(10, 20)), roles=(), moves_to=Span(10, 20), since=NOW)
    records = [peer_record("a", Span(0, 10)), loading]
    assert pick_span(records, 30, 10, me=ME, now=NOW) == Span(20, 30)
    assert pick_span(records, 30, 10, me=PeerId("b"), now=NOW) != Span(0, 10)


def test_a_slow_device_takes_fewer_blocks_than_fit_and_a_fast_one_all_of_them() -> None:
    others = [host(name, Span(0, 20), 20.0) for name in "abcd"]
    assert [len(pick_among(others, 20, 16, me=ME, block_rate=rate)) for rate in (0.01, 1.0, 2.0, 50.0)] == [1, 4, 8, 16]
    assert len(pick_among(others, 20, 16, me=ME)) == 16
    assert pick_among([], 20, 16, me=ME, block_rate=0.01) in (Span(0, 16), Span(4, 20))


def test_a_slow_device_still_fills_a_gap_that_it_has_room_for() -> None:
    others = [host("a", Span(0, 8), 80.0), host("b", Span(14, 20), 60.0)]
    assert pick_among(others, 20, 16, me=ME, block_rate=0.1) == Span(8, 14)
    assert len(pick_among(others, 20, 4, me=ME, block_rate=0.1)) == 4


def test_a_hop_through_a_slow_host_takes_at_most_four_times_as_long_as_others() -> None:
    assert suited_length(10.0, 25.0) == 10
    assert suited_length(10.0, 1e-9) == 1
    assert suited_length(0.0, 1.0) > 1000


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 11), st.integers(1, 6)), max_size=8), st.integers(1, 12), st.integers(0, 99))
def test_the_choice_fits_covers_gaps_and_ignores_the_order_of_records(
    spans: list[tuple[int, int]], length: int, seed: int
) -> None:
    records = [peer_record(f"p{i}", Span(s, min(12, s + n)), speed=7.3 * i) for i, (s, n) in enumerate(spans)]
    span = pick_span(records, 12, length, me=ME, now=NOW)
    assert len(span) == min(length, 12)
    assert span.end <= 12
    shuffled = random.Random(seed).sample(records, len(records))
    assert pick_span(shuffled, 12, length, me=ME, now=NOW) == span
    empty = set(range(12)) - {b for r in records for b in r.span.blocks()}
    most = max(len(empty & set(range(s, s + len(span)))) for s in range(12 - len(span) + 1))
    assert len(empty & set(span.blocks())) == most
