"""What held-out rows give, as sums: loss, tokens, and for rows with a label what each was taken for, how surely. Pure.

Sums of several peers add up to those of all their rows together. Loss, accuracy and F1 of the total are exactly those
of the pooled rows. AUC is not: scores are counted in bins, and two rows in one bin count as equal; `auc_error` bounds
what that can change.

Legend: R rows, C labels, B bins; S labels whose scores are counted: all, or of two only the second, as the first's
mirror it.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swarm.data.labelled import MAX_LABELS

Counts = NDArray[np.int64]

MOST_BINS = 128
MAX_TOKENS = 10**9  # of one peer, as much as a peer may weigh in a round
MAX_MEAN_LOSS = 1e3  # nats; a model that knows nothing has the logarithm of its vocabulary, at most 13
MOST_BYTES = 3000  # of one peer's counts; a record of the directory has 4096
_SOFT = 4.0  # nats of log-odds at which half of the bins on one side are behind
_LEAST_BINS = 2
_HEADER = struct.Struct("<BB")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LabelSums:
    """`counts` int64 [3, C]: rows that were taken for each label and have it, were taken for it, have it.
    `scores` int64 [S, 2, B]: for each label that is scored, rows without it and rows with it, by their score's bin.
    """

    counts: Counts
    scores: Counts

    @property
    def num_bins(self) -> int:
        """B, a power of two."""
        return int(self.scores.shape[2])

    @property
    def num_rows(self) -> int:
        """R."""
        return int(self.counts[2].sum())

    def coarsened(self, num_bins: int) -> LabelSums:
        """With so many bins, at most as many as now: neighbours are put together."""
        shape = (*self.scores.shape[:2], num_bins, self.num_bins // num_bins)
        return LabelSums(counts=self.counts, scores=self.scores.reshape(shape).sum(axis=3))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sums:
    """Summed loss in nats over so many tokens; and of the rows with a label, chosen among the labels that `label_set`
    names (a digest, empty where there are none).
    """

    loss: float
    tokens: int
    labels: LabelSums | None = None
    label_set: bytes = b""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """How well `rows` were classified. F1 and AUC are means over labels, each against the rest; `auc` is within
    `auc_error` of that of the pooled rows, and None where no label has both rows with it and rows without.
    """

    rows: int
    accuracy: float
    macro_f1: float
    auc: float | None
    auc_error: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Held-out loss (mean per token, nats) with the adapter of one round, over the data of `peers` trainers."""

    round: int
    loss: float
    tokens: int
    peers: int = 1
    scores: Scores | None = None

    @property
    def perplexity(self) -> float:
        """Of the held-out text; bounded, so that a loss that exploded still prints."""
        return math.exp(min(self.loss, 50.0))


def label_sums(scores_RC: NDArray[np.float64], truth_R: NDArray[np.int64]) -> LabelSums:
    """The sums of rows whose labels have these log-likelihoods (nats), and of which `truth_R` is right. Of equally
    likely labels a row is taken for the first.
    """
    # What is no number must not be the most likely; that the model is broken shows in the loss.
    scores_RC = np.nan_to_num(scores_RC, nan=-1e9, posinf=1e9, neginf=-1e9)
    num_labels = scores_RC.shape[1]
    taken_R = scores_RC.argmax(axis=1)
    found = (truth_R[taken_R == truth_R], taken_R, truth_R)
    counts = np.stack([np.bincount(each, minlength=num_labels) for each in found]).astype(np.int64)
    scored = range(1, 2) if num_labels == 2 else range(num_labels)
    scores = np.zeros((len(scored), 2, MOST_BINS), dtype=np.int64)
    for place, label in enumerate(scored):
        others_R = np.logaddexp.reduce(np.delete(scores_RC, label, axis=1), axis=1)
        odds_R = scores_RC[:, label] - others_R + math.log(num_labels - 1)
        np.add.at(scores[place], ((truth_R == label).astype(np.int64), _bins(odds_R)), 1)
    return LabelSums(counts=counts, scores=scores)


def add_up(parts: Sequence[Sums], label_set: bytes) -> Sums:
    """The sums of all rows together; of those with a label, where the labels are those of `label_set`."""
    labels = None
    for part in parts:
        if part.labels is not None and part.label_set == label_set:
            labels = part.labels if labels is None else _added(labels, part.labels)
    return Sums(
        loss=math.fsum(part.loss for part in parts),
        tokens=sum(part.tokens for part in parts),
        labels=labels,
        label_set=label_set if labels is not None else b"",
    )


def evaluation_of(number: int, sums: Sums, *, peers: int = 1) -> Evaluation:
    """What the sums of `peers` trainers say of the adapter of round `number`."""
    return Evaluation(
        round=number,
        loss=sums.loss / max(1, sums.tokens),
        tokens=sums.tokens,
        peers=peers,
        scores=None if sums.labels is None else scores_of(sums.labels),
    )


def scores_of(sums: LabelSums) -> Scores:
    """Accuracy, F1 and AUC of the rows behind `sums`."""
    right, taken, having = sums.counts.astype(np.float64)
    seen = taken + having > 0  # a label that no row has and none was taken for is no reason for a worse mean
    aucs = [_auc(without, with_it) for without, with_it in sums.scores.astype(np.float64)]
    defined = [each for each in aucs if each is not None]
    return Scores(
        rows=sums.num_rows,
        accuracy=float(right.sum() / max(1.0, having.sum())),
        macro_f1=float((2 * right[seen] / (taken + having)[seen]).mean()) if seen.any() else 0.0,
        auc=math.fsum(value for value, _ in defined) / len(defined) if defined else None,
        auc_error=math.fsum(error for _, error in defined) / len(defined) if defined else 0.0,
    )


def check(sums: Sums) -> None:
    """Refuse sums that no rows can give.

    Raises:
        ValueError: says which.
    """
    if not 0 < sums.tokens <= MAX_TOKENS:
        raise ValueError(f"{sums.tokens} tokens, not 1 to {MAX_TOKENS}")
    if not 0 <= sums.loss <= MAX_MEAN_LOSS * sums.tokens:
        raise ValueError(f"a loss of {sums.loss:g} on {sums.tokens} tokens")
    if sums.labels is not None and sums.labels.num_rows > sums.tokens:
        raise ValueError(f"{sums.labels.num_rows} rows with a label in {sums.tokens} tokens")


def pack(sums: LabelSums) -> bytes:
    """The counts as at most MOST_BYTES bytes, for `parse`; with fewer bins where they need more."""
    while True:
        header = _HEADER.pack(sums.counts.shape[1], sums.num_bins.bit_length() - 1)
        values = np.concatenate([sums.counts.ravel(), sums.scores.ravel()])
        data = header + zlib.compress(values.astype("<u4").tobytes(), 9)
        if len(data) <= MOST_BYTES or sums.num_bins == _LEAST_BINS:  # at the least they always fit
            return data
        sums = sums.coarsened(sums.num_bins // 2)


def parse(data: bytes) -> LabelSums:
    """What another peer has packed.

    Raises:
        ValueError: it is no such thing, or its counts contradict each other; the message says which.
    """
    if not _HEADER.size < len(data) <= MOST_BYTES:
        raise ValueError(f"{len(data)} bytes of counts")
    num_labels, log_bins = _HEADER.unpack_from(data)
    if not (2 <= num_labels <= MAX_LABELS and _LEAST_BINS <= 1 << log_bins <= MOST_BINS):
        raise ValueError(f"counts of {num_labels} labels in 2**{log_bins} bins")
    shape = (1 if num_labels == 2 else num_labels, 2, 1 << log_bins)
    size = 4 * (3 * num_labels + math.prod(shape))
    unpacker = zlib.decompressobj()
    try:
        raw = unpacker.decompress(data[_HEADER.size :], size + 1)
    except zlib.error:
        raise ValueError("counts that cannot be unpacked") from None
    if len(raw) != size or not unpacker.eof or unpacker.unused_data:
        raise ValueError(f"counts that are not {size} bytes")
    values = np.frombuffer(raw, dtype="<u4").astype(np.int64)
    sums = LabelSums(counts=values[: 3 * num_labels].reshape(3, -1), scores=values[3 * num_labels :].reshape(shape))
    _check_counts(sums)
    return sums


def _check_counts(sums: LabelSums) -> None:
    right, taken, having = sums.counts
    if (right > np.minimum(taken, having)).any() or taken.sum() != having.sum():
        raise ValueError("counts of labels that contradict each other")
    scored = having[1:] if len(having) == 2 else having
    without, with_it = sums.scores.sum(axis=2).T
    if (with_it != scored).any() or (without != having.sum() - scored).any():
        raise ValueError("counts of scores that are not those of the rows")


def _bins(odds_R: NDArray[np.float64]) -> Counts:
    """Where log-odds over chance fall, of MOST_BINS bins that are narrow around 0 and wide where hardly any row is."""
    share_R = 0.5 + 0.5 * odds_R / (np.abs(odds_R) + _SOFT)
    return np.clip((share_R * MOST_BINS).astype(np.int64), 0, MOST_BINS - 1)


def _added(one: LabelSums, other: LabelSums) -> LabelSums:
    num_bins = min(one.num_bins, other.num_bins)
    return LabelSums(
        counts=one.counts + other.counts,
        scores=one.coarsened(num_bins).scores + other.coarsened(num_bins).scores,
    )


def _auc(without_B: NDArray[np.float64], with_B: NDArray[np.float64]) -> tuple[float, float] | None:
    """The share of pairs of a row with the label and one without in which the first scores higher, pairs in one bin
    counting half; and how far that can be from the truth, in which each of those counts nothing or all.
    """
    pairs = float(without_B.sum() * with_B.sum())
    if not pairs:
        return None
    lower_B = np.cumsum(without_B) - without_B
    tied = float((with_B * without_B).sum()) / 2
    return (float((with_B * lower_B).sum()) + tied) / pairs, tied / pairs
