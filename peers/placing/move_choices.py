"""Which moves are possible in a swarm, and what each would make of it: arrays, for all hosts at once. Pure.

Letters: M movers, S first blocks, N blocks, C choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from blocks.spans import Span
from peers.network import PeerId
from peers.placing.placement import common_pace, suited_length
from peers.placing.standing import Standing
from peers.placing.throughput import Floats, Spans, even_levels, flows, rates_inside, spans_of

Ints = npt.NDArray[np.int64]
_FINALISTS = 24  # choices that are handed on; the others are left out by a rough score
_SHARPNESS = 4  # of the soft minimum: how much more the weakest blocks count than others
_LEAST_LEVEL = 1e-3  # of the mean: below it a block counts as this weak


@dataclass(frozen=True, kw_only=True, slots=True)
class Everybody:
    """All hosts, by peer id, with what they are bound for as arrays.

    `stays_N` counts the hosts that serve a block and have not promised to leave it; `gap_N` marks the blocks that
    nobody holds or has promised to hold.
    """

    standings: Sequence[Standing]
    spans: Spans
    stays_N: Ints
    gap_N: npt.NDArray[np.bool_]

    @staticmethod
    def of(standings: Sequence[Standing], num_blocks: int) -> Everybody:
        """Put standings in order and count holders."""
        ordered = sorted(standings, key=lambda one: one.peer)
        spans = spans_of(ordered)
        gap = _counts(spans.starts, spans.ends, num_blocks) == 0
        serving = np.array([one.serving for one in ordered], dtype=np.bool_)
        starts = np.maximum(spans.starts, np.array([one.span.start for one in ordered], dtype=np.int64))[serving]
        ends = np.minimum(spans.ends, np.array([one.span.end for one in ordered], dtype=np.int64))[serving]
        stays = _counts(starts, np.maximum(starts, ends), num_blocks)
        return Everybody(standings=ordered, spans=spans, stays_N=stays, gap_N=gap)

    @property
    def num_blocks(self) -> int:
        """How many blocks the model has."""
        return len(self.gap_N)


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """Moves that are possible, one entry each: who (a place in the standings), and to which span `[start, end)`.

    `filled_C` counts blocks of it that nobody holds now. `cost_C` is a rough score, less is better: over the blocks
    that are held then, the sum of each one's even level, as a share of the mean, to the power of -4.
    """

    place_C: Ints
    start_C: Ints
    end_C: Ints
    filled_C: Ints
    cost_C: Floats

    def take(self, chosen: npt.NDArray[np.int64]) -> Choices:
        """The entries at `chosen`."""
        return Choices(**{name: getattr(self, name)[chosen] for name in self.__dataclass_fields__})


def choices_of(everybody: Everybody, movers: Sequence[int], keep: int) -> Choices | None:
    """The most promising moves of `movers` (places in the standings), at most 24; None if there are none.

    No move leaves a block that fewer than `keep` others serve and stay at. While there are gaps, only moves that fill
    as much of them as any can.
    """
    if not movers:
        return None
    place_M = np.array(movers, dtype=np.int64)
    start_S = np.arange(everybody.num_blocks)
    kept_M = np.array([kept(everybody.standings[place].span, everybody.stays_N, keep) for place in movers])
    gaps_before = np.concatenate([[0], np.cumsum(everybody.gap_N)])
    found: list[Choices] = []
    for length_M in _lengths(everybody, movers):
        end_MS = start_S + length_M[:, None]
        fits = (end_MS <= everybody.num_blocks) & (start_S <= kept_M[:, :1]) & (end_MS >= kept_M[:, 1:])
        spans = everybody.spans
        fits &= (start_S != spans.starts[place_M, None]) | (end_MS != spans.ends[place_M, None])
        end_MS = np.minimum(end_MS, everybody.num_blocks)
        filled_MS = gaps_before[end_MS] - gaps_before[start_S]
        mover, start = np.nonzero(fits)
        found.append(
            Choices(
                place_C=place_M[mover],
                start_C=start,
                end_C=end_MS[mover, start],
                filled_C=filled_MS[mover, start],
                cost_C=_costs(everybody, place_M, length_M, end_MS)[mover, start],
            )
        )
    every = Choices(
        **{name: np.concatenate([getattr(one, name) for one in found]) for name in Choices.__dataclass_fields__}
    )
    most = every.filled_C.max(initial=0)
    every = every.take(np.flatnonzero(every.filled_C == most))
    if not len(every.cost_C) or (everybody.gap_N.any() and most == 0):
        return None
    return every.take(np.argsort(every.cost_C, kind="stable")[:_FINALISTS])


def choice_of(everybody: Everybody, peer: PeerId, span: Span) -> Choices:
    """The one move of `peer`, who is among everybody, to `span`."""
    place_C = np.array([next(place for place, one in enumerate(everybody.standings) if one.peer == peer)])
    start_C, end_C = np.array([span.start]), np.array([span.end])
    end_MS = np.minimum(np.arange(everybody.num_blocks) + len(span), everybody.num_blocks)[None]
    return Choices(
        place_C=place_C,
        start_C=start_C,
        end_C=end_C,
        filled_C=np.array([everybody.gap_N[span.start : span.end].sum()]),
        cost_C=_costs(everybody, place_C, end_C - start_C, end_MS)[:, span.start],
    )


def kept(span: Span, stays_N: Ints, keep: int = 1) -> tuple[int, int]:
    """The stretch of its span that a host may not leave, as fewer than `keep` others stay there; (N, 0) if none.

    `stays_N` is how many hosts stay at each block, this one among them.
    """
    few = np.flatnonzero(stays_N[span.start : span.end] - 1 < keep)
    return (span.start + int(few[0]), span.start + int(few[-1]) + 1) if len(few) else (len(stays_N), 0)


def throughput_after(everybody: Everybody, choices: Choices) -> Floats:
    """Tokens/s after each choice, through the blocks that somebody holds then."""
    spans, place_C = everybody.spans, choices.place_C
    old = _inside(spans.starts[place_C], spans.ends[place_C], everybody.num_blocks)
    new = _inside(choices.start_C, choices.end_C, everybody.num_blocks)
    rates = spans.rates[place_C, None, None]
    blocks = np.arange(everybody.num_blocks)
    held = (choices.start_C[:, None] <= blocks) & (blocks < choices.end_C[:, None]) | ~everybody.gap_N
    return flows(rates_inside(spans, everybody.num_blocks) + rates * new - rates * old, held.astype(np.float64))


def soft_minimum(everybody: Everybody, choices: Choices) -> tuple[float, Floats]:
    """Where there is no gap, a soft minimum of the even levels now, and after each choice.

    It rises, too, when one of two places that are equally weak gets stronger, which the throughput does not.
    """
    levels = even_levels(everybody.spans, everybody.num_blocks)
    now = np.sum(np.maximum(levels / levels.mean(), _LEAST_LEVEL) ** -_SHARPNESS)
    return float(now ** (-1 / _SHARPNESS)), choices.cost_C ** (-1 / _SHARPNESS)


def _counts(starts: Ints, ends: Ints, num_blocks: int) -> Ints:
    """How many of the spans `[start, end)` each block is in."""
    change = np.zeros(num_blocks + 1, dtype=np.int64)
    np.add.at(change, starts, 1)
    np.add.at(change, ends, -1)
    counts: Ints = np.cumsum(change)[:-1]
    return counts


def _inside(start_C: Ints, end_C: Ints, num_blocks: int) -> npt.NDArray[np.bool_]:
    """For each span, between which boundaries a <= b it lies."""
    bounds = np.arange(num_blocks + 1)
    return (bounds <= start_C[:, None])[:, :, None] & (bounds >= end_C[:, None])[:, None, :]


def _lengths(everybody: Everybody, movers: Sequence[int]) -> list[Ints]:
    """Numbers of blocks worth trying for each mover: as now, as suits its speed; for a gap also more."""
    standings = [everybody.standings[place] for place in movers]
    most = np.array([min(one.capacity, everybody.num_blocks) for one in standings])
    as_now = np.minimum(most, [len(one.span) for one in standings])
    pace = common_pace(everybody.standings)
    suited = np.minimum(most, [suited_length(pace, one.block_rate) for one in standings])
    tried = [as_now, suited]
    gap = np.flatnonzero(everybody.gap_N)
    if len(gap):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], everybody.gap_N.astype(np.int64), [0]])))
        longest = int((edges[1::2] - edges[::2]).max())
        tried += [np.minimum(most, np.maximum(suited, longest)), most]
        starts = np.array([min(one.span.start, gap[0]) for one in standings])
        ends = np.array([max(one.span.end, gap[-1] + 1) for one in standings])
        tried.append(np.where(ends - starts <= most, ends - starts, as_now))
    return tried


def _costs(everybody: Everybody, place_M: Ints, length_M: Ints, end_MS: Ints) -> Floats:
    """See Choices.cost_C, for each mover and first block."""
    spans, gap_N = everybody.spans, everybody.gap_N
    levels = even_levels(spans, everybody.num_blocks)
    mean = levels.mean()
    rate_M = spans.rates[place_M] / mean
    blocks = np.arange(everybody.num_blocks)
    held_MN = (spans.starts[place_M, None] <= blocks) & (blocks < spans.ends[place_M, None])
    own_M = rate_M / (spans.ends - spans.starts)[place_M]
    without_MN = np.where(gap_N, 0.0, np.maximum(levels / mean - own_M[:, None] * held_MN, _LEAST_LEVEL))
    outside_MN = np.where(gap_N, 0.0, np.maximum(without_MN, _LEAST_LEVEL) ** -_SHARPNESS)
    within_MN = np.maximum(without_MN + (rate_M / length_M)[:, None], _LEAST_LEVEL) ** -_SHARPNESS
    nothing = np.zeros((len(place_M), 1))
    change = np.cumsum(np.concatenate([nothing, within_MN - outside_MN], axis=1), axis=1)
    costs: Floats = outside_MN.sum(axis=1)[:, None] + np.take_along_axis(change, end_MS, axis=1) - change[:, :-1]
    return costs
