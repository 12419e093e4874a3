"""Robust means against plain references and attackers, and who is doubted when a reducer lies."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from averaging.errors import BadTensors
from averaging.robust import MIN_HOLDERS, ROBUST, Segment, combine, convicted, doubtful
from peers.network import PeerId

PEERS = [PeerId(f"peer{number}") for number in range(8)]


def whole(pieces, shares=None):
    return [Segment(0, pieces[0].numel(), tuple(shares or [1 / len(pieces)] * len(pieces)))]


def updates(seed: int, num_peers: int, num_values: int, signal: float = 1.0):
    """A direction in common and noise of each peer's own."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(num_values, generator=generator)
    return [signal * common + torch.randn(num_values, generator=generator) for _ in range(num_peers)]


def clip_reference(values, shares):
    values, weights = np.stack([v.numpy() for v in values]).astype(np.float64), np.array(shares) / sum(shares)
    centre = np.median(values, axis=0)
    radius = sorted(np.linalg.norm(values - centre, axis=1))[(len(values) - 1) // 2]
    for _ in range(3):
        differences = values - centre
        lengths = np.linalg.norm(differences, axis=1)
        centre = centre + sum(
            w * d * min(1, radius / length if length else 1)
            for w, d, length in zip(weights, differences, lengths, strict=True)
        )
    return torch.tensor(centre * sum(shares), dtype=torch.float32)


def trim_reference(values, shares):
    cut = max(1, len(values) // 4)
    rows = np.stack([v.numpy() for v in values]).astype(np.float64)
    norms = np.linalg.norm(rows, axis=1)
    usual = np.sort(norms)[(len(norms) - 1) // 2]
    middle = np.sort(rows * np.minimum(1, usual / norms)[:, None], axis=0)[cut:-cut]
    return torch.tensor(middle.mean(axis=0) * sum(shares), dtype=torch.float32)


def krum_reference(values, shares):
    bad = max(1, len(values) // 4)
    rows = [v.numpy().astype(np.float64) for v in values]
    scores = []
    for one in rows:
        distances = sorted(float(((one - other) ** 2).sum()) for other in rows if other is not one)
        scores.append(sum(distances[: len(rows) - bad - 2]))
    chosen = np.argsort(scores, kind="stable")[: len(rows) - bad]
    return torch.tensor(np.mean([rows[index] for index in chosen], axis=0) * sum(shares), dtype=torch.float32)


def test_none_is_the_sum_by_share_segment_by_segment():
    pieces = updates(0, 3, 10)
    segments = [Segment(0, 4, (0.5, 0.5, 0.0)), Segment(4, 4, (1.0, 0.0, 0.0)), Segment(4, 10, (0.1, 0.2, 0.7))]
    second = sum(share * piece[4:] for share, piece in zip((0.1, 0.2, 0.7), pieces, strict=True))
    expected = torch.cat([0.5 * pieces[0][:4] + 0.5 * pieces[1][:4], second])
    torch.testing.assert_close(combine("none", pieces, segments), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ROBUST)
def test_no_share_means_no_word_whatever_the_values(name):
    pieces = updates(0, 6, 50)
    shares = (0.3, 0.2, 0.3, 0.0, 0.1, 0.1)
    quiet = combine(name, pieces, whole(pieces, shares))
    pieces[3] = torch.full((50,), 3e38)
    assert torch.equal(combine(name, pieces, whole(pieces, shares)), quiet)
    assert not combine(name, pieces, whole(pieces, [0.0] * 6)).any()


REFERENCES = [("clip", clip_reference), ("trimmed", trim_reference), ("krum", krum_reference)]


@pytest.mark.parametrize(
    "shares",
    [(0.3, 0.2, 0.1, 0.25, 0.1, 0.05), (0.3, 0.2, 0.1, 0.2, 0.1, 0.05), (1.0, 0.0, 2.0, 3.0, 4.0, 1.0)],
)
@pytest.mark.parametrize(("name", "reference"), REFERENCES)
def test_robust_rules_are_their_references_also_across_chunks_and_segments(name, reference, shares):
    size = 70_000  # more than a chunk
    pieces = updates(1, 6, size + 33)
    pieces[2] *= 20
    segments = [Segment(0, size, shares), Segment(size, size + 33, shares[::-1])]
    found = combine(name, pieces, segments)
    for segment in segments:
        active = [index for index, share in enumerate(segment.shares) if share > 0]
        values = [pieces[index][segment.start : segment.stop] for index in active]
        expected = reference(values, [segment.shares[index] for index in active])
        torch.testing.assert_close(found[segment.start : segment.stop], expected, rtol=1e-6, atol=1e-5)


ATTACKS = {
    "inverted": lambda mean: -5 * mean,
    "huge": lambda mean: torch.full_like(mean, 3e38),
    "random": lambda mean: 30 * torch.randn(mean.shape, generator=torch.Generator().manual_seed(5)),
    "zero": lambda mean: 0 * mean,
}


@pytest.mark.parametrize("attack", ["inverted", "huge", "random"])
@pytest.mark.parametrize("name", ["clip", "trimmed"])
def test_two_attackers_of_eight_move_the_plain_mean_and_not_the_robust_one(name, attack):
    pieces = updates(2, 8, 2000)
    honest = sum(pieces[:6]) / 6
    pieces[6:] = [ATTACKS[attack](honest)] * 2
    plain, robust = (float((combine(rule, pieces, whole(pieces)) - honest).norm()) for rule in ("none", name))
    assert robust < 0.6 * float(honest.norm())
    assert plain > 1.2 * float(honest.norm())


def test_one_attacker_of_three_is_clipped():
    pieces = updates(3, 3, 2000)
    honest = (pieces[0] + pieces[1]) / 2
    pieces[2] = torch.full((2000,), -1e30)
    assert float((combine("clip", pieces, whole(pieces)) - honest).norm()) < 2 * float(honest.norm())


@pytest.mark.parametrize("name", ROBUST)
def test_when_all_agree_every_rule_gives_what_they_agree_on(name):
    piece = updates(4, 1, 100)[0]
    torch.testing.assert_close(combine(name, [piece] * 5, whole([piece] * 5)), piece)


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 9), st.integers(0, 1000), st.data())
def test_the_trimmed_mean_stays_between_zero_and_the_honest_values(num_peers, seed, data):
    pieces = updates(seed, num_peers, 20)
    bad = data.draw(st.sets(st.integers(0, num_peers - 1), max_size=num_peers // 4))
    extremes = st.floats(-(2.0**100), 2.0**100, width=32)
    for index in bad:
        pieces[index] = torch.tensor(data.draw(st.lists(extremes, min_size=20, max_size=20)))
    honest = torch.stack([piece for index, piece in enumerate(pieces) if index not in bad])
    found = combine("trimmed", pieces, whole(pieces))
    assert (found >= honest.amin(0).clamp(max=0) - 1e-5).all()
    assert (found <= honest.amax(0).clamp(min=0) + 1e-5).all()


@pytest.mark.parametrize("name", ["clip", "trimmed", "krum"])
def test_too_few_holders_are_told_how_many_the_rule_needs(name):
    least = MIN_HOLDERS[name]
    pieces = updates(0, least, 10)
    combine(name, pieces, whole(pieces))
    for few in (whole(pieces, [0.0] + [0.5] * (least - 1)), whole(pieces[1:])):
        with pytest.raises(BadTensors, match=f"'{name}' needs {least} holders with samples and found {least - 1}"):
            combine(name, pieces[-len(few[0].shares) :], few)


def test_what_does_not_fit_is_refused():
    pieces = updates(0, 2, 10)
    with pytest.raises(ValueError, match="use one of none, clip, trimmed, krum"):
        combine("median", pieces, whole(pieces))
    for segments in (
        [Segment(0, 9, (1.0, 0.0))],
        [Segment(1, 10, (1.0, 0.0))],
        [Segment(0, 6, (1.0, 0.0)), Segment(5, 10, (1.0, 0.0))],
        [Segment(0, 10, (1.0,))],
    ):
        with pytest.raises(ValueError, match="segment"):
            combine("none", pieces, segments)
    with pytest.raises(ValueError, match="flat"):
        combine("none", [pieces[0], pieces[1][:5]], whole(pieces))
    for share in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="shares"):
            Segment(0, 10, (share, 1.0))
    with pytest.raises(ValueError, match="not a range"):
        Segment(3, 2, (1.0,))


LIES = {
    "inverted": lambda mean: -mean,
    "zeroed": lambda mean: 0 * mean,
    "random": lambda mean: torch.randn(mean.shape, generator=torch.Generator().manual_seed(6)) * mean.std(),
    "ten times": lambda mean: 10 * mean,
    "a tenth": lambda mean: mean / 10,
    "not finite": lambda mean: mean / 0,
}


def judge(seed, num_values, liars, lie):
    """Who eight holders convict, where peer k reduces slice k; cosines to the mean are about .35 to .85."""
    generator = torch.Generator().manual_seed(seed)
    signals = 0.3 + torch.rand(8, generator=generator) * 1.2
    common = torch.randn(8, num_values, generator=generator)
    own_PKV = signals[:, None, None] * common + torch.randn(8, 8, num_values, generator=generator)
    results = list(own_PKV.mean(0))
    for liar in liars:
        results[liar] = lie(results[liar])
    doubts = {
        peer: frozenset(PEERS[k] for k, doubt in enumerate(doubtful(list(own), results)) if doubt)
        for peer, own in zip(PEERS, own_PKV, strict=True)
    }
    return convicted(doubts, len(PEERS))


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize(("num_values", "num_tries"), [(100, 15), (1000, 5), (20_000, 1)])
def test_a_lying_reducer_is_convicted_and_nobody_else(lie, num_values, num_tries):
    for seed in range(num_tries):
        assert judge(seed, num_values, [2], LIES[lie]) == {PEERS[2]}
        assert judge(seed, num_values, [2, 5], LIES[lie]) == {PEERS[2], PEERS[5]}


def test_honest_reducers_are_not_convicted():
    assert not any(judge(seed, 100, [], None) for seed in range(60))


def test_a_lie_within_the_bounds_passes_as_documented():
    assert not judge(0, 1000, [2], lambda mean: 2 * mean)


@pytest.mark.parametrize(
    ("usual", "turned", "is_doubted"),
    [
        (0.4, 0.18, False),
        (0.4, 0.1, True),
        (0.8, 0.45, False),
        (0.8, 0.35, True),
        (0.09, -0.3, False),
        (-0.5, -0.9, False),
    ],
)
def test_a_turned_answer_is_in_doubt_below_half_the_median_and_a_quarter_below_it(usual, turned, is_doubted):
    """What is turned less passes, and a holder that has little in common with the mean cannot tell."""
    piece, other = torch.zeros(1000), torch.zeros(1000)
    piece[::2], other[1::2] = 1.0, 1.0
    results = [cosine * piece + math.sqrt(1 - cosine**2) * other for cosine in [usual] * 4 + [turned]]
    assert doubtful([piece] * 5, results) == (False,) * 4 + (is_doubted,)


def test_without_enough_to_compare_only_what_is_not_finite_is_in_doubt():
    piece = updates(0, 1, 100)[0]
    lies = [piece, -piece, 0 * piece, piece / 0]
    assert doubtful([piece] * 3, lies[1:]) == (False, False, True)
    assert doubtful([piece, piece, piece, 0 * piece], lies) == (False, False, False, True)
    short = piece[:20]
    assert doubtful([piece] * 3 + [short], [piece, piece, -piece, -short]) == (False,) * 4
    assert doubtful([piece] * 4 + [short], [piece, piece, -piece, piece, -short]) == (False, False, True, False, False)
    assert doubtful([piece] * 4, [0 * piece] * 4) == (False,) * 4
    assert doubtful([], []) == ()


def test_it_takes_more_than_half_of_the_others_and_none_counts_for_itself():
    accused = frozenset({PEERS[0]})
    for voters, is_convicted in ((3, False), (4, True)):
        doubts = dict.fromkeys(PEERS[1 : 1 + voters], accused)
        assert convicted(doubts, 8) == (accused if is_convicted else frozenset())
        assert convicted({**doubts, PEERS[0]: accused}, 8) == (accused if is_convicted else frozenset())
    assert convicted({}, 8) == frozenset()
