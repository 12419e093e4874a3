"""The books: a microbatch counts at most once per block, whatever happens in whatever order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocks.spans import Span
from blocks.training import ledger as books
from blocks.training.ledger import Counted, Ledger, MicrobatchId, Piece

HELD = Span(2, 5)
SPANS = [Span(2, 5), Span(2, 3), Span(3, 5), Span(4, 5)]


def piece(step: int = 0, index: int = 0, *, span: Span = HELD, trainer: str = "ann", life: int = 1) -> Piece:
    return Piece(MicrobatchId(trainer, life, step, index), span)


def count(ledger: Ledger, one: Piece, *, samples: int = 4, tokens: int = 10) -> frozenset[int]:
    ledger.open(one, samples=samples, deadline=9.0)
    ledger.answer(one, tokens=tokens, deadline=9.0)
    return ledger.commit(one)


_EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["open", "answer", "commit", "drop"]),
        st.integers(0, 2),
        st.integers(0, 1),
        st.sampled_from(SPANS),
    ),
    max_size=60,
)


@given(_EVENTS)
def test_a_microbatch_counts_at_most_once_per_block(events: list[tuple[str, int, int, Span]]) -> None:
    ledger = Ledger(HELD, batch_size=1000)
    counted: dict[tuple[MicrobatchId, int], int] = {}
    for what, step, index, span in events:
        one = piece(step, index, span=span)
        if what == "open":
            ledger.open(one, samples=1, deadline=1.0)
        elif what == "answer" and ledger.is_open(one):
            ledger.answer(one, tokens=3, deadline=1.0)
        elif what == "commit" and ledger.is_pending(one):
            for block in ledger.commit(one):
                counted[one.microbatch, block] = counted.get((one.microbatch, block), 0) + 1
            assert ledger.is_counted(one)
            assert not ledger.is_pending(one)
        elif what == "drop":
            ledger.drop(one)
            assert not ledger.is_open(one)
            assert not ledger.is_pending(one)
        assert not (ledger.is_open(one) and ledger.is_pending(one))
    assert set(counted.values()) <= {1}
    for block in HELD.blocks():
        of_block = sum(1 for _, where in counted if where == block)
        tally = ledger.tallies[block]
        assert (tally.samples, tally.tokens) == (of_block, 3 * of_block)
        assert tally.round_samples == tally.total_samples == of_block


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), max_size=120))
def test_a_forgotten_microbatch_never_counts_again(order: list[tuple[int, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(books, "REMEMBERED_IDS", 5)
        ledger = Ledger(Span(0, 1), batch_size=1000)
        seen: set[tuple[int, int]] = set()
        for step, index in order:
            fresh = count(ledger, piece(step, index, span=Span(0, 1)))
            assert not (fresh and (step, index) in seen), "counted twice"
            assert ledger.is_counted(piece(step, index, span=Span(0, 1)))
            seen.add((step, index))


def test_two_pieces_of_one_microbatch_on_one_host_both_count() -> None:
    ledger = Ledger(HELD, batch_size=8)
    first, second = piece(span=Span(2, 3)), piece(span=Span(3, 5))
    ledger.open(first, samples=4, deadline=1.0)
    ledger.open(second, samples=4, deadline=1.0)
    ledger.answer(second, tokens=5, deadline=1.0)
    ledger.answer(first, tokens=5, deadline=1.0)
    assert ledger.commit(first) == {2}
    assert not ledger.is_counted(second)
    assert not ledger.is_counted(piece())
    assert ledger.commit(second) == {3, 4}
    assert ledger.is_counted(piece())


def test_one_trainer_cannot_push_another_out_of_the_books_with_new_lives() -> None:
    ledger = Ledger(HELD, batch_size=8)
    honest = piece(trainer="bob")
    assert count(ledger, honest)
    for life in range(2 * books.REMEMBERED_LIVES):
        count(ledger, piece(life=life))
    assert ledger.is_counted(honest)
    assert not count(ledger, honest)


def test_blocks_fall_due_when_their_samples_reach_the_batch() -> None:
    ledger = Ledger(HELD, batch_size=8)
    count(ledger, piece(0))
    assert ledger.due() == []
    count(ledger, piece(1, span=Span(3, 5)), samples=5, tokens=20)
    assert ledger.due() == [3, 4]
    closed = ledger.stepped(3)
    assert (closed.samples, closed.tokens) == (9, 30)
    assert ledger.due() == [4]
    assert (ledger.tallies[3].samples, ledger.tallies[3].tokens) == (0, 0)
    assert ledger.tallies[3].round_samples == 9, "a step is not a round"


def test_a_round_leaves_the_samples_that_came_after_it_was_weighed() -> None:
    ledger = Ledger(HELD, batch_size=100)
    count(ledger, piece(0), samples=6)
    ledger.stepped(2)
    weighed = ledger.tallies[2].since_round
    assert (weighed.samples, weighed.steps) == (6, 1)
    assert weighed.tokens > 0
    count(ledger, piece(1), samples=3)
    ledger.round_done(2, counted=weighed, total_samples=50)
    assert ledger.tallies[2].round_samples == 3
    assert ledger.tallies[2].total_samples == 53
    ledger.round_done(2, counted=Counted(samples=1000, tokens=1000, steps=9), total_samples=60)
    assert ledger.tallies[2].round_samples == 0


def test_trained_tokens_grow_with_every_commit_and_by_nothing_else() -> None:
    ledger = Ledger(HELD, batch_size=4)
    assert ledger.trained_tokens == 0
    count(ledger, piece(0), tokens=10)
    count(ledger, piece(0), tokens=10)  # sent again
    count(ledger, piece(1, span=Span(3, 5)), tokens=7)
    assert ledger.trained_tokens == 17, "of the blocks that have seen most"
    ledger.stepped(3)
    ledger.round_done(3, counted=Counted(samples=8, tokens=17, steps=1), total_samples=0)
    ledger.drop(piece(2))
    assert ledger.trained_tokens == 17
    ledger.made_step(samples=1, tokens=3)
    assert ledger.trained_tokens == 20


def test_overdue_are_those_whose_deadline_has_passed() -> None:
    ledger = Ledger(HELD, batch_size=8)
    ledger.open(piece(0), samples=1, deadline=5.0)
    ledger.open(piece(1), samples=1, deadline=5.0)
    ledger.answer(piece(1), tokens=1, deadline=7.0)
    assert ledger.overdue(4.9) == []
    assert ledger.overdue(5.0) == [piece(0)]
    assert ledger.overdue(7.0) == [piece(0), piece(1)]
    assert ledger.open_pieces() == [piece(0)]
    assert ledger.pieces_of(piece(1).microbatch) == [piece(1)]
