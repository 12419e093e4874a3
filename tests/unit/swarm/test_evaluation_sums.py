"""Sums of held-out rows: those of several peers give what their rows together do, and no false ones are taken."""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torchmetrics.functional.classification import binary_auroc, multiclass_accuracy, multiclass_f1_score

from swarm.data.labelled import MAX_LABELS
from swarm.training.evaluation_sums import (
    MAX_TOKENS,
    MOST_BINS,
    MOST_BYTES,
    LabelSums,
    Sums,
    add_up,
    check,
    evaluation_of,
    label_sums,
    pack,
    parse,
    scores_of,
)

SET = b"12345678"
Rows = tuple[NDArray[np.float64], NDArray[np.int64]]


def some_rows(count: int, num_labels: int, *, scale: float = 2.0, seed: int = 0) -> Rows:
    """Log-likelihoods that point to the right label more often than not."""
    dice = np.random.default_rng(seed)
    truth = dice.integers(0, num_labels, count)
    scores = dice.normal(size=(count, num_labels)) * scale
    scores[np.arange(count), truth] += scale
    return scores, truth


def pooled(parts: list[Rows]) -> Rows:
    return np.concatenate([scores for scores, _ in parts]), np.concatenate([truth for _, truth in parts])


def odds_of(scores: NDArray[np.float64], label: int) -> torch.Tensor:
    """What a label's AUC ranks rows by: its log-odds against the others, squeezed as torchmetrics wants it."""
    others = torch.logsumexp(torch.from_numpy(np.delete(scores, label, axis=1)), dim=1)
    return torch.from_numpy(scores[:, label]) - others


def exact_auc(scores: NDArray[np.float64], truth: NDArray[np.int64]) -> float:
    found = []
    for label in range(scores.shape[1]):
        has = torch.from_numpy(truth == label)
        if 0 < has.sum() < len(has):
            ranks = odds_of(scores, label).unique(return_inverse=True)[1].double()
            found.append(float(binary_auroc(ranks / ranks.numel(), has.long(), thresholds=None)))
    return float(np.mean(found))


@pytest.mark.parametrize(("num_labels", "scale"), list(product((2, 3, 7, 40), (0.3, 3.0, 30.0))))
def test_the_sums_of_peers_give_the_scores_of_their_rows_together(num_labels: int, scale: float) -> None:
    parts = [some_rows(count, num_labels, scale=scale, seed=count) for count in (1, 40, 200)]
    sums = [Sums(loss=1.0, tokens=len(rows[1]), labels=label_sums(*rows), label_set=SET) for rows in parts]
    total = add_up(sums, SET).labels
    assert total is not None
    found = scores_of(total)
    scores, truth = pooled(parts)
    taken, right = torch.from_numpy(scores), torch.from_numpy(truth)
    assert found.rows == len(truth)
    assert found.accuracy == pytest.approx(
        float(multiclass_accuracy(taken, right, num_classes=num_labels, average="micro"))
    )
    assert found.macro_f1 == pytest.approx(
        float(multiclass_f1_score(taken, right, num_classes=num_labels, average="macro")), abs=1e-6
    )
    assert found.auc is not None
    assert abs(found.auc - exact_auc(scores, truth)) <= found.auc_error + 1e-6
    assert found.auc_error < 0.06


def test_auc_is_that_of_all_pairs_where_scores_lie_apart() -> None:
    """By its definition, on every order of four rows with two labels each."""
    for places in product(range(4), repeat=4):
        for marks in product((0, 1), repeat=4):
            if len(set(marks)) < 2:
                continue
            scores = np.array([[0.0, 4.0 * place - 6] for place in places])
            found = scores_of(label_sums(scores, np.array(marks)))
            pairs = [
                (place > other) + 0.5 * (place == other)
                for place, mark in zip(places, marks, strict=True)
                for other, without in zip(places, marks, strict=True)
                if mark and not without
            ]
            assert found.auc == pytest.approx(np.mean(pairs))
            ties = sum(pair == 0.5 for pair in pairs) / len(pairs)
            assert found.auc_error == pytest.approx(ties / 2)


def test_what_cannot_be_said_is_not() -> None:
    one_sided = scores_of(label_sums(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0, 0])))
    assert one_sided.auc is None
    assert (one_sided.accuracy, one_sided.macro_f1) == (0.5, pytest.approx((2 / 3 + 0) / 2))
    unseen = scores_of(label_sums(np.array([[1.0, 0.0, -9.0], [0.0, 1.0, -9.0]]), np.array([0, 1])))
    assert unseen.macro_f1 == 1.0, "a label that nobody has is not in the mean"
    assert unseen.auc == 1.0


def test_a_model_that_gives_no_numbers_is_no_better_than_chance() -> None:
    found = scores_of(label_sums(np.full((4, 2), math.nan), np.array([0, 1, 0, 1])))
    assert (found.accuracy, found.auc) == (0.5, 0.5)
    assert scores_of(label_sums(np.array([[math.nan, -5.0]]), np.array([0]))).accuracy == 0.0


def test_rows_with_labels_of_others_are_left_out_and_losses_are_not() -> None:
    labels = label_sums(*some_rows(10, 2))
    parts = [
        Sums(loss=10.0, tokens=4, labels=labels, label_set=SET),
        Sums(loss=2.0, tokens=8),
        Sums(loss=1.0, tokens=8, labels=label_sums(*some_rows(9, 3)), label_set=b"87654321"),
    ]
    total = add_up(parts, SET)
    assert (total.loss, total.tokens) == (13.0, 20)
    assert total.labels is not None
    assert total.labels.num_rows == 10
    found = evaluation_of(3, total, peers=3)
    assert (found.round, found.loss, found.tokens, found.peers) == (3, 0.65, 20, 3)
    assert found.perplexity == pytest.approx(math.exp(0.65))
    assert evaluation_of(3, add_up(parts, b"")).scores is None


@settings(deadline=None, max_examples=50)
@given(num_labels=st.integers(2, MAX_LABELS), count=st.integers(1, 3000), seed=st.integers(0, 9))
def test_counts_travel_whole_in_a_few_kilobytes(num_labels: int, count: int, seed: int) -> None:
    sums = label_sums(*some_rows(count, num_labels, seed=seed))
    data = pack(sums)
    assert len(data) <= MOST_BYTES
    found = parse(data)
    assert (found.counts == sums.counts).all()
    assert (found.scores == sums.coarsened(found.num_bins).scores).all()


def test_the_largest_counts_fit_with_fewer_bins_and_add_to_finer_ones() -> None:
    dice = np.random.default_rng(0)
    scores = dice.integers(0, 10**5, (MAX_LABELS, 2, MOST_BINS))
    large = LabelSums(counts=dice.integers(0, 2**31, (3, MAX_LABELS)), scores=scores)
    data = pack(large)
    assert len(data) <= MOST_BYTES
    assert 1 << data[1] < MOST_BINS
    coarse = label_sums(*some_rows(50, 3)).coarsened(16)
    fine = label_sums(*some_rows(70, 3, seed=1))
    total = add_up([Sums(loss=0.0, tokens=99, labels=each, label_set=SET) for each in (fine, coarse)], SET).labels
    assert total is not None
    assert total.num_bins == 16
    assert total.num_rows == 120
    assert (total.scores == fine.coarsened(16).scores + coarse.scores).all()


def packed(values: NDArray[np.int64], num_labels: int = 2, log_bins: int = 7) -> bytes:
    return bytes([num_labels, log_bins]) + zlib.compress(values.astype("<u4").tobytes(), 9)


def good_values() -> NDArray[np.int64]:
    sums = label_sums(*some_rows(20, 2))
    return np.concatenate([sums.counts.ravel(), sums.scores.ravel()])


def changed(place: int, by: int) -> NDArray[np.int64]:
    values = good_values()
    values[place] += by
    return values


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes of counts"),
        (b"\2\7", "2 bytes of counts"),
        (b"\2\7" + bytes(MOST_BYTES), f"{MOST_BYTES + 2} bytes of counts"),
        (packed(good_values(), num_labels=1), "counts of 1 labels in 2\\*\\*7 bins"),
        (packed(good_values(), num_labels=MAX_LABELS + 1), "counts of 65 labels"),
        (packed(good_values(), log_bins=0), "in 2\\*\\*0 bins"),
        (packed(good_values(), log_bins=200), "in 2\\*\\*200 bins"),
        (packed(good_values(), log_bins=6), "counts that are not 536 bytes"),
        (packed(np.zeros(5 * 10**5, dtype=np.int64)), "counts that are not 1048 bytes"),
        (packed(good_values())[:-3], "counts that are not 1048 bytes"),
        (packed(good_values()) + b"more", "counts that are not 1048 bytes"),
        (b"\2\7no zlib at all", "cannot be unpacked"),
        (packed(changed(0, 100)), "counts of labels that contradict"),
        (packed(changed(2, 1)), "counts of labels that contradict"),
        (packed(changed(0, -30)), "counts of labels that contradict"),  # below zero it is very large
        (packed(changed(6, 1)), "counts of scores that are not those of the rows"),
        (packed(changed(6 + 2 * MOST_BINS - 1, 1)), "counts of scores that are not those of the rows"),
    ],
)
def test_counts_that_no_rows_give_are_refused(data: bytes, reason: str) -> None:
    assert parse(packed(good_values())).num_rows == 20
    with pytest.raises(ValueError, match=reason):
        parse(data)


@settings(deadline=None)
@given(st.binary(max_size=200) | st.binary(max_size=200).map(lambda raw: b"\2\1" + zlib.compress(raw)))
def test_no_bytes_break_the_reader(data: bytes) -> None:
    try:
        found = parse(data)
    except ValueError:
        return
    assert scores_of(found).rows == found.num_rows


GOOD = Sums(loss=30.0, tokens=20, labels=label_sums(*some_rows(20, 2)), label_set=SET)


@pytest.mark.parametrize(
    ("sums", "reason"),
    [
        (replace(GOOD, loss=math.nan), "a loss of nan on 20 tokens"),
        (replace(GOOD, loss=math.inf), "a loss of inf"),
        (replace(GOOD, loss=-1.0), "a loss of -1 on"),
        (replace(GOOD, loss=2.1e4), "a loss of 21000 on"),
        (replace(GOOD, tokens=0), "0 tokens"),
        (replace(GOOD, tokens=-5), "-5 tokens"),
        (replace(GOOD, tokens=MAX_TOKENS + 1), "1000000001 tokens"),
        (replace(GOOD, tokens=19), "20 rows with a label in 19 tokens"),
    ],
)
def test_sums_that_no_rows_give_are_refused(sums: Sums, reason: str) -> None:
    check(GOOD)
    with pytest.raises(ValueError, match=reason):
        check(sums)


def test_a_header_is_two_bytes() -> None:
    """Others read what this version writes."""
    data = pack(label_sums(np.array([[0.0, 2.0]]), np.array([1])))
    values = struct.unpack("<262I", zlib.decompress(data[2:]))
    assert data[:2] == bytes([2, 7])
    assert values[:6] == (0, 1, 0, 1, 0, 1)
    assert [place for place, value in enumerate(values[6:]) if value] == [MOST_BINS + int(MOST_BINS * (0.5 + 1 / 6))]
