"""Means that a few bad peers cannot move far, and doubt about those who combine.

Pure: a reducer calls `combine` on what the senders gave it; each holder calls `doubtful` on what the reducers gave it
back, and whoever counts the holders' doubts calls `convicted`. Signatures, weights and bans are elsewhere.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from averaging.errors import BadTensors
from averaging.recipe import ROBUST
from peers.network import PeerId

MIN_HOLDERS: Mapping[str, int] = {"none": 1, "clip": 3, "trimmed": 4, "krum": 5}
"""How many senders with a share a rule needs. Among fewer nobody can say who is out of line."""

_CHUNK = 1 << 14  # values of each sender at once: what a core's cache holds of a few senders in float64
_CLIP_ROUNDS = 3

_MIN_SLICES = 4
_MIN_VALUES = 32
_COSINE_MARGIN = 0.25
_COSINE_NOISE = 2.0  # standard errors of a cosine over n values, each at most 1 / sqrt(n)
_MIN_COSINE = 0.1
_NORM_FACTOR = 4.0


@dataclass(frozen=True, slots=True)
class Segment:
    """The values `[start, stop)` of a vector, which belong to one unit, and each sender's share of that unit.

    Raises:
        ValueError: the range is reversed, or a share is negative or not finite.
    """

    start: int
    stop: int
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"segment {self.start}:{self.stop} is not a range")
        if not all(math.isfinite(share) and share >= 0 for share in self.shares):
            raise ValueError(f"segment {self.start}:{self.stop} has shares {self.shares}; they must be 0 or more")


def combine(name: str, pieces: Sequence[Tensor], segments: Sequence[Segment]) -> Tensor:
    """One vector of the senders' `pieces`, each fp32 and flat [n] and finite; `segments` tile `[0, n)`.

    A sender takes part in a segment when its share there is above 0; where nobody does, the result is 0.

    - `none`: the sum of share times piece, in the senders' order.
    - `clip`: CenteredClip (Karimireddy et al., 2012.10333). The centre starts at the coordinate-wise median and moves
      three times by the mean, by share, of the differences to it, none longer than the radius: the median distance.
    - `trimmed`: the coordinate-wise mean without the lowest and the highest quarter, rounded down but at least one
      each (Yin et al., 1803.01498), of pieces no longer than their median norm. Every sender counts once, as a share is
      what a sender claims.
    - `krum`: the mean of all but a quarter of the senders (rounded down, at least one): those that are nearest to
      their nearest, as Multi-Krum chooses (Blanchard et al., NeurIPS 2017). Every sender counts once.

    The last three are times the sum of the shares, which is 1 unless a sender is missing.

    Raises:
        BadTensors: fewer senders have a share than the rule needs.
        ValueError: there is no such rule, or pieces and segments do not fit each other.
    """
    if name not in ROBUST:
        raise ValueError(f"'{name}' is not a rule for means; use one of {', '.join(ROBUST)}")
    num_values = pieces[0].numel()
    _check_fit(pieces, segments, num_values)
    result = torch.zeros(num_values)
    for segment in segments:
        active = [index for index, share in enumerate(segment.shares) if share > 0]
        if not active or segment.start == segment.stop:
            continue
        if len(active) < MIN_HOLDERS[name]:
            raise BadTensors(
                f"averaging by '{name}' needs {MIN_HOLDERS[name]} holders with samples and found {len(active)}; "
                "wait for more, or average by 'none'"
            )
        values = [pieces[index][segment.start : segment.stop] for index in active]
        shares = [segment.shares[index] for index in active]
        into = result[segment.start : segment.stop]
        if name == "none":
            for value, share in zip(values, shares, strict=True):
                into.add_(value, alpha=share)
        elif name == "clip":
            _clip(values, shares, into)
        elif name == "trimmed":
            _trim(values, shares, into)
        else:
            _choose(values, shares, into)
    return result


def doubtful(own: Sequence[Tensor], results: Sequence[Tensor]) -> tuple[bool, ...]:
    """Which reducers' answers are out of line with the others', as one holder sees it; both fp32, flat, per reducer.

    The holder gave reducer k its piece `own[k]` and got `results[k]`. It cannot compute the mean, as it has only its
    own piece; but cosine and norm ratio between piece and mean should be alike in all slices, since each is a sample
    of the same vectors. In doubt is who is far from the median over the slices: a cosine both below half the median
    and below it by 0.25 (more for slices so small that chance does that), or a norm 4 times larger or smaller.
    Without 4 slices of 32 values there is no median to trust, and only values that are not finite are in doubt.

    The limit: a lie that keeps within these bounds passes, so a reducer can scale its slice by up to 4, or turn it
    so far that the cosine falls by a quarter, but neither replace nor invert it; a holder whose updates have little
    in common with the mean sees norms alone. A holder that is wrong on its own does no harm, as it takes a majority
    (`convicted`); that a majority of the reducers is honest is assumed.
    """
    doubts = [not bool(torch.isfinite(result).all()) for result in results]
    cosines: dict[int, float] = {}
    ratios: dict[int, float] = {}
    for index, (piece, result) in enumerate(zip(own, results, strict=True)):
        if doubts[index] or piece.numel() < _MIN_VALUES:
            continue
        dot, piece_norm, result_norm = _products(piece, result)
        if piece_norm > 0:
            ratios[index] = result_norm / piece_norm
            cosines[index] = dot / (piece_norm * result_norm) if result_norm > 0 else 0.0
    if len(ratios) < _MIN_SLICES:
        return tuple(doubts)
    usual_cosine, usual_ratio = median(cosines.values()), median(ratios.values())
    for index, ratio in ratios.items():
        margin = max(_COSINE_MARGIN, _COSINE_NOISE / math.sqrt(own[index].numel()))
        is_turned = cosines[index] < min(usual_cosine - margin, usual_cosine / 2)
        is_scaled = ratio > usual_ratio * _NORM_FACTOR or ratio < usual_ratio / _NORM_FACTOR
        doubts[index] = (usual_cosine > _MIN_COSINE and is_turned) or (usual_ratio > 0 and is_scaled)
    return tuple(doubts)


def convicted(doubts: Mapping[PeerId, frozenset[PeerId]], num_holders: int) -> frozenset[PeerId]:
    """Who is doubted by more than half of the holders other than itself; `doubts` says by holder whom it doubts.

    The caller lets only holders in. Of two holders each could convict the other alone: ask only among three or more.
    """
    votes = Counter(accused for holder, accusations in doubts.items() for accused in accusations if accused != holder)
    return frozenset(accused for accused, count in votes.items() if 2 * count > num_holders - 1)


def _check_fit(pieces: Sequence[Tensor], segments: Sequence[Segment], num_values: int) -> None:
    if any(piece.shape != (num_values,) for piece in pieces):
        raise ValueError(f"the pieces are not all flat with {num_values} values")
    end = 0
    for segment in segments:
        if segment.start != end or len(segment.shares) != len(pieces):
            raise ValueError(
                f"segment {segment.start}:{segment.stop} with {len(segment.shares)} shares does not follow {end} "
                f"with one share for each of {len(pieces)} pieces"
            )
        end = segment.stop
    if end != num_values:
        raise ValueError(f"the segments end at {end}, the pieces at {num_values}")


def _chunks(num_values: int) -> Iterator[slice]:
    for start in range(0, num_values, _CHUNK):
        yield slice(start, min(start + _CHUNK, num_values))


def _stack(values: Sequence[Tensor], where: slice) -> Tensor:
    """The senders' chunk in float64, [senders, values]: differences and squares of huge fp32 values stay finite."""
    return torch.stack([value[where] for value in values]).double()


def _clip(values: Sequence[Tensor], shares: Sequence[float], into: Tensor) -> None:
    share_sum = math.fsum(shares)
    weights_S = torch.tensor(shares, dtype=torch.float64) / share_sum
    centre = torch.zeros(into.numel(), dtype=torch.float64)
    squares_S = torch.zeros(len(values), dtype=torch.float64)
    for where in _chunks(into.numel()):
        chunk_SV = _stack(values, where)
        centre[where] = _median(chunk_SV)
        squares_S += (chunk_SV - centre[where]).square().sum(dim=1)
    radius = float(squares_S.sqrt().median())  # of an even number the lower one: half may be bad, and far
    for _ in range(_CLIP_ROUNDS):
        distances_S = squares_S.sqrt()
        factors_S = torch.where(distances_S > radius, radius / distances_S, 1.0) * weights_S
        squares_S = torch.zeros_like(squares_S)
        for where in _chunks(into.numel()):
            chunk_SV = _stack(values, where)
            centre[where] += factors_S @ (chunk_SV - centre[where])
            squares_S += (chunk_SV - centre[where]).square().sum(dim=1)
    into.copy_(centre * share_sum)


def _trim(values: Sequence[Tensor], shares: Sequence[float], into: Tensor) -> None:
    norms_S = torch.diag(_gram(values)).sqrt()
    usual = float(norms_S.median())  # of an even number the lower one: half may be bad, and long
    factors_S1 = torch.where(norms_S > usual, usual / norms_S, 1.0)[:, None]
    cut = max(1, len(values) // 4)
    for where in _chunks(into.numel()):
        middle = _sorted(_stack(values, where) * factors_S1)[cut : len(values) - cut]
        into[where] = (torch.stack(middle).mean(dim=0) * math.fsum(shares)).float()


def _choose(values: Sequence[Tensor], shares: Sequence[float], into: Tensor) -> None:
    count = len(values)
    bad = max(1, count // 4)
    gram_SS = _gram(values)
    squares_S = torch.diag(gram_SS)
    distances_SS = (squares_S[:, None] + squares_S[None, :] - 2 * gram_SS).clamp(min=0).fill_diagonal_(math.inf)
    scores_S = distances_SS.sort(dim=1).values[:, : count - bad - 2].sum(dim=1)
    chosen = sorted(scores_S.argsort(stable=True)[: count - bad].tolist())
    for index in chosen:
        into += values[index] * (math.fsum(shares) / len(chosen))


def _gram(values: Sequence[Tensor]) -> Tensor:
    """Dot products of all pairs, [senders, senders] in float64, chunk by chunk."""
    gram_SS = torch.zeros(len(values), len(values), dtype=torch.float64)
    for where in _chunks(values[0].numel()):
        chunk_SV = _stack(values, where)
        gram_SS += chunk_SV @ chunk_SV.T
    return gram_SS


def _sorted(chunk_SV: Tensor) -> list[Tensor]:
    """The rows, sorted value by value, by exchanging neighbours: for few senders far faster than torch's own sort."""
    rows = list(chunk_SV)
    for turn in range(len(rows)):
        for low in range(turn % 2, len(rows) - 1, 2):
            rows[low : low + 2] = [torch.minimum(*rows[low : low + 2]), torch.maximum(*rows[low : low + 2])]
    return rows


def _median(chunk_SV: Tensor) -> Tensor:
    """The mean of the two in the middle, where torch's own takes the lower and so leans to one side."""
    rows = _sorted(chunk_SV)
    return (rows[(len(rows) - 1) // 2] + rows[len(rows) // 2]) / 2


def _products(piece: Tensor, result: Tensor) -> tuple[float, float, float]:
    """The dot product and both norms, in float64, chunk by chunk."""
    dot = piece_square = result_square = 0.0
    for where in _chunks(piece.numel()):
        one, other = piece[where].double(), result[where].double()
        dot += float(one @ other)
        piece_square += float(one @ one)
        result_square += float(other @ other)
    return dot, math.sqrt(piece_square), math.sqrt(result_square)
