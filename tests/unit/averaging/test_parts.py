"""Which values are whose part, what is computed of them, and that lossy codecs lose nothing over the rounds."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from averaging.codecs import make_codec
from averaging.errors import BadTensors
from averaging.parts import Debts, Stretch, combine_part, doubted_reducers, part_bytes, stretches
from averaging.robust import Segment, combine

SIZE = 24
SEGMENTS = (
    Segment(0, 7, (0.5, 0.25, 0.25)),
    Segment(7, 16, (0.125, 0.875, 0.0)),
    Segment(16, 16, (1.0, 0.0, 0.0)),
    Segment(16, 24, (1 / 3, 1 / 3, 1 / 3)),
)
LOSSY = ["fp16", "int8", "int4", "topk"]


def vectors(num_peers: int, seed: int = 0, size: int = SIZE):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for _ in range(num_peers)]


def plain_sum(pieces, shares_at):
    """Value by value, from nothing but the definition: `shares_at(i)` are the senders' shares of value i."""
    return torch.tensor(
        [sum(share * float(piece[i]) for share, piece in zip(shares_at(i), pieces, strict=True)) for i in range(SIZE)]
    )


def shares_at(place: int):
    return next(segment.shares for segment in SEGMENTS if segment.start <= place < segment.stop)


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=5))
def test_stretches_tile_the_vector_reducer_by_reducer(sizes):
    found = stretches(sizes)
    assert [[one.stop - one.start for one in own] for own in found] == sizes
    flat = [one for own in found for one in own]
    assert [one.start for one in flat] == [0, *[one.stop for one in flat]][: len(flat)]
    vector = torch.arange(sum(map(sum, sizes)))
    assert torch.equal(torch.cat([torch.arange(0), *[one.of(vector) for one in flat]]), vector)


def test_a_stretch_is_a_view():
    vector = torch.zeros(5)
    Stretch(1, 3).of(vector).fill_(2.0)
    assert vector.tolist() == [0.0, 2.0, 2.0, 0.0, 0.0]


@settings(max_examples=30)
@given(st.lists(st.integers(1, SIZE - 1), max_size=4), st.sampled_from(["none", "clip"]))
def test_parts_put_together_are_the_whole_with_each_units_own_shares(cuts, rule):
    """Of `none` for any cut; `clip` measures whole pieces, so that only a cut at a unit's end gives the same."""
    segments = SEGMENTS if rule == "none" else [Segment(one.start, one.stop, (0.2, 0.5, 0.3)) for one in SEGMENTS]
    ends = sorted({0, *cuts, SIZE}) if rule == "none" else [0, 7, 16, 24]
    pieces = vectors(3)
    parts = [Stretch(start, stop) for start, stop in itertools.pairwise(ends)]
    found = torch.cat([combine_part(rule, [part.of(one) for one in pieces], segments, part) for part in parts])
    assert torch.equal(found, combine(rule, pieces, segments))
    if rule == "none":
        torch.testing.assert_close(found, plain_sum(pieces, shares_at), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_the_others_count_for_the_share_of_one_whose_piece_was_dropped(gone):
    pieces, part = vectors(3), Stretch(3, 20)

    def without(place):
        own = shares_at(place)
        left = [0.0 if index == gone else share for index, share in enumerate(own)]
        return [share / sum(left) for share in left]

    given_pieces = [None if index == gone else part.of(one) for index, one in enumerate(pieces)]
    found = combine_part("none", given_pieces, SEGMENTS, part)
    torch.testing.assert_close(found, part.of(plain_sum(pieces, without)), rtol=1e-6, atol=1e-6)


def test_shares_that_do_not_sum_to_one_keep_their_sum_when_a_piece_is_dropped():
    """FedNova's shares, whose sum is how far all go together."""
    ones = [torch.ones(4), torch.ones(4), None]
    found = combine_part("none", ones, [Segment(0, 4, (0.5, 1.5, 1.0))], Stretch(0, 4))
    torch.testing.assert_close(found, torch.full((4,), 3.0))


def test_where_only_the_dropped_had_a_share_nothing_changes():
    pieces = [torch.ones(SIZE), None, torch.ones(SIZE)]
    segments = [Segment(0, 10, (0.0, 1.0, 0.0)), Segment(10, SIZE, (0.5, 0.0, 0.5))]
    found = combine_part("none", pieces, segments, Stretch(0, SIZE))
    assert found.tolist() == [0.0] * 10 + [1.0] * 14
    none = [None, None, None]
    assert not combine_part("none", none, SEGMENTS, Stretch(0, SIZE)).any()


def test_a_robust_mean_leaves_the_dropped_out_and_says_so_when_too_few_are_left():
    segments, part = [Segment(0, SIZE, (0.25,) * 4)], Stretch(2, 20)
    pieces = [part.of(one) for one in vectors(4)]
    found = combine_part("clip", [*pieces[:3], None], segments, part)
    expected = combine("clip", pieces[:3], [Segment(0, 18, (1 / 3,) * 3)])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(BadTensors, match="'clip' needs 3"):
        combine_part("clip", [*pieces[:2], None, None], segments, part)


def all_reduce(codec, given_vectors, segments, owed):
    """One round of three holders who reduce a third each; what all decode, and what each owes after it."""
    parts = stretches([[4, 4], [8], [3, 5]])
    debts = [Debts(codec, vector, *own) for vector, own in zip(given_vectors, owed, strict=True)]
    result = torch.zeros(SIZE)
    for reducer, own_parts in enumerate(parts):
        for part in own_parts:
            pieces = []
            for sender, one in enumerate(debts):
                piece = part.of(one.vector)
                if sender != reducer:
                    data = codec.encode(piece)
                    one.note_sent(part, data)
                    piece = codec.decode(data, piece.numel())
                pieces.append(piece)
            exact = debts[reducer].with_owed(part, combine_part("none", pieces, segments, part))
            decoded = codec.decode(codec.encode(exact), exact.numel())
            debts[reducer].note_summed(part, exact, decoded)
            part.of(result).copy_(decoded)
    return result, [(one.sent, one.summed) for one in debts]


@pytest.mark.parametrize("name", LOSSY)
def test_over_the_rounds_both_debts_make_up_for_what_the_codec_loses(name):
    codec, num_rounds = make_codec(name, top_share=0.3), 60
    updates = vectors(3, seed=4)
    exact = combine("none", updates, SEGMENTS)
    owed, total, errors = [(None, None)] * 3, torch.zeros(SIZE), []
    for count in range(1, num_rounds + 1):
        result, owed = all_reduce(codec, updates, SEGMENTS, owed)
        total += result
        errors.append(float((total / count - exact).norm() / exact.norm()))
    plain, _ = all_reduce(codec, updates, SEGMENTS, [(None, None)] * 3)
    lost = float((plain - exact).norm() / exact.norm())
    assert errors[0] == pytest.approx(lost)
    assert errors[-1] < lost / 10, "without debts every round would lose the same again"
    # What was not given yet is exactly what is owed: by the senders, by their shares, and by the reducers.
    debt = combine("none", [sent for sent, _ in owed], SEGMENTS) + sum(summed for _, summed in owed)
    torch.testing.assert_close(total + debt, num_rounds * exact, rtol=1e-4, atol=1e-4)


def test_one_side_of_the_debts_is_not_enough():
    codec, updates = make_codec("int4"), vectors(3, seed=4)
    exact = combine("none", updates, SEGMENTS)

    def error_after(keeps):
        owed, total = [(None, None)] * 3, torch.zeros(SIZE)
        for _ in range(30):
            result, new = all_reduce(codec, updates, SEGMENTS, owed)
            owed = [tuple(one if kept else None for one, kept in zip(own, keeps, strict=True)) for own in new]
            total += result
        return float((total / 30 - exact).norm())

    both = error_after((True, True))
    assert both < error_after((True, False)) / 3
    assert both < error_after((False, True)) / 3


def test_a_codec_that_loses_nothing_owes_nothing_and_the_sum_is_exact():
    updates = vectors(3)
    result, owed = all_reduce(make_codec("fp32"), updates, SEGMENTS, [(None, None)] * 3)
    assert owed == [(None, None)] * 3
    assert torch.equal(result, combine("none", updates, SEGMENTS))


def test_debts_change_nothing_that_they_were_given():
    codec, vector = make_codec("int4"), vectors(1)[0]
    old = [vectors(1, seed=seed)[0] for seed in (1, 2)]
    copies = [one.clone() for one in (vector, *old)]
    debts = Debts(codec, vector, *old)
    assert torch.equal(debts.vector, vector + old[0])
    part = Stretch(0, 8)
    debts.note_sent(part, codec.encode(part.of(debts.vector)))
    debts.note_summed(part, torch.ones(8), torch.zeros(8))
    assert all(torch.equal(one, copy) for one, copy in zip((vector, *old), copies, strict=True))
    assert not debts.sent[8:].any(), "what was not sent is not owed to anybody"
    assert torch.equal(debts.summed[8:], old[1][8:]), "a sum that was another's to make is owed still"
    assert torch.equal(debts.summed[:8], torch.ones(8))


@pytest.mark.parametrize("num_reducers", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("num_values", [100_000, 499_999, 500_000, 500_001])
def test_rounding_leaves_no_part_of_a_few_values_over(num_values, num_reducers):
    size = part_bytes(4 * num_values, num_reducers, 2**21) // 4
    share = -(-num_values // num_reducers) + 1  # shares are uneven by a value
    assert -(-share // size) == 3 or size == 2**12


def test_reducers_are_doubted_by_place_and_those_without_parts_are_passed_over():
    vector = vectors(1, size=600)[0]
    parts = stretches([[60, 60], [120], [], [100, 20], [120], [120]])
    mean = 0.5 * vector
    assert doubted_reducers(vector, mean, parts) == frozenset()
    for place in (0, 1, 3, 5):
        bent = mean.clone()
        for part in parts[place]:
            part.of(bent).neg_()
        assert doubted_reducers(vector, bent, parts) == {place}
