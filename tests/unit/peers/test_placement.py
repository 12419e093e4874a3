from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks.errors import BadSpan
from blocks.spans import Span
from peers.network import PeerId
from peers.placement import pick_span
from tests.fakes import peer_record

ME = PeerId("QmME")


def test_a_gap_is_filled_before_anything_is_doubled() -> None:
    records = [peer_record("a", Span(0, 10)), peer_record("b", Span(20, 30))]
    assert pick_span(records, 30, 10, me=ME) == Span(10, 20)


def test_the_slower_half_is_strengthened() -> None:
    records = [peer_record("a", Span(0, 15), speed=900), peer_record("b", Span(15, 30), speed=100)]
    assert pick_span(records, 30, 15, me=ME) == Span(15, 30)


def test_more_blocks_than_the_model_has_means_all_of_them() -> None:
    assert pick_span([], 6, 100, me=ME) == Span(0, 6)
    with pytest.raises(BadSpan):
        pick_span([], 6, 0, me=ME)


def test_own_old_record_does_not_count() -> None:
    assert pick_span([peer_record(ME, Span(0, 3)), peer_record("b", Span(3, 6))], 6, 3, me=ME) == Span(0, 3)


def test_peers_that_start_at_the_same_moment_spread_over_equal_choices() -> None:
    chosen = {pick_span([], 40, 10, me=PeerId(f"Qm{i}")) for i in range(40)}
    assert chosen == {Span(0, 10), Span(10, 20), Span(20, 30), Span(30, 40)}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 11), st.integers(1, 6)), max_size=8), st.integers(1, 12), st.integers(0, 99))
def test_the_choice_fits_covers_gaps_and_ignores_the_order_of_records(
    spans: list[tuple[int, int]], length: int, seed: int
) -> None:
    records = [peer_record(f"p{i}", Span(s, min(12, s + n)), speed=7.3 * i) for i, (s, n) in enumerate(spans)]
    span = pick_span(records, 12, length, me=ME)
    assert len(span) == min(length, 12)
    assert span.end <= 12
    shuffled = random.Random(seed).sample(records, len(records))
    assert pick_span(shuffled, 12, length, me=ME) == span
    empty = set(range(12)) - {b for r in records for b in r.span.blocks()}
    most = max(len(empty & set(range(s, s + len(span)))) for s in range(12 - len(span) + 1))
    assert len(empty & set(span.blocks())) == most
