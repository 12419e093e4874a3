"""How many batches `--steps 0` brings: what is missing to the run's total, whoever has brought the rest."""

from __future__ import annotations

import pytest

from blocks.spans import Span
from peers.records import ProgressRecord
from swarm.training.missing import missing_steps, samples_done
from tests.fakes import RUN, fake_peer_id

FRONT, BACK, ALL = Span(0, 3), Span(3, 6), Span(0, 6)


def at(name: str, span: Span, *, number: int, since: int, averaged: int) -> ProgressRecord:
    """A host at round `number`, whose blocks had seen `averaged` samples by then, and `since` here after it."""
    return ProgressRecord(
        run=RUN,
        peer=fake_peer_id(name),
        span=span,
        round=number,
        samples=since,
        total_samples=averaged + since,
        expires_at=9.0,
    )


def test_holders_of_a_block_add_up_since_their_round_and_agree_on_what_was_before() -> None:
    front = [at("a", FRONT, number=2, since=10, averaged=64), at("c", FRONT, number=2, since=22, averaged=64)]
    assert samples_done([*front, at("b", BACK, number=2, since=32, averaged=64)], 6) == 96
    assert samples_done([at("all", ALL, number=0, since=0, averaged=0)], 6) == 0


def test_the_block_that_has_seen_fewest_counts() -> None:
    back = at("b", BACK, number=2, since=4, averaged=64)
    assert samples_done([at("a", FRONT, number=2, since=32, averaged=64), back], 6) == 68
    assert samples_done([at("all", ALL, number=2, since=9, averaged=64), back], 6) == 73


def test_what_a_host_at_an_older_round_has_counted_since_is_not_there() -> None:
    late = at("late", ALL, number=1, since=500, averaged=32)
    assert samples_done([late, at("a", ALL, number=3, since=5, averaged=96)], 6) == 101


def test_blocks_that_nobody_holds_and_a_run_without_hosts() -> None:
    assert samples_done([at("a", FRONT, number=1, since=1, averaged=32)], 6) == 33
    assert samples_done([], 6) == 0


def test_a_record_that_contradicts_itself_does_no_harm() -> None:
    torn = ProgressRecord(
        run=RUN, peer=fake_peer_id("x"), span=ALL, round=0, samples=10, total_samples=3, expires_at=9.0
    )
    assert samples_done([torn], 6) == 10


@pytest.mark.parametrize(
    ("done", "total", "steps"),
    [(0, 100, 13), (0, 96, 12), (95, 96, 1), (96, 96, 0), (2**53, 96, 0), (88, 96, 1), (1, 96, 12)],
)
def test_whole_batches_to_the_total(done: int, total: int, steps: int) -> None:
    assert missing_steps(done=done, total=total, batch_size=8) == steps
