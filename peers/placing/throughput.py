"""How many tokens a second a placement can do at most, and how many the best placement could. Pure.

The model: every token goes through every block once; a host computes `block_rate` blocks x tokens each second and
may share that time among the blocks of its span as it likes; replicas of a block share its tokens (data parallel),
the blocks follow each other (pipeline parallel). So the swarm does t tokens/s if every block can be given t out of the
time of its holders, which is a flow from hosts to blocks. By min cut and max flow, the largest t is the least, over all
sets of blocks B, of (rate of the hosts that hold any of B) / |B|. Latency, links and the sizes of batches are left out.
Routes come near to that flow where chains may change hosts at any block; where they stay with a host to the end of its
span, they get less out of the same placement.

As spans are intervals, the hosts that hold nothing of B are those whose spans lie within one of the gaps between the
blocks of B. That makes the search for the worst B a shortest path over block boundaries, and the quotient is minimised
by Newton's method on t (Dinkelbach 1967), for many placements at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from blocks.errors import BadSpan
from blocks.spans import MAX_BLOCKS
from peers.placing.standing import Standing

Floats = npt.NDArray[np.float64]
_ROUNDING = 1e-12  # of all rates: what sums in another order may be off


@dataclass(frozen=True, kw_only=True, slots=True)
class Spans:
    """Spans `[start, end)` of many hosts as arrays, one entry a host, and how many blocks x tokens/s each computes."""

    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    rates: Floats


def spans_of(standings: Sequence[Standing]) -> Spans:
    """What hosts serve, or are about to, as arrays."""
    goals = [one.goal for one in standings]
    return Spans(
        starts=np.array([goal.start for goal in goals], dtype=np.int64),
        ends=np.array([goal.end for goal in goals], dtype=np.int64),
        rates=np.array([one.block_rate for one in standings], dtype=np.float64),
    )


def throughput(standings: Sequence[Standing], num_blocks: int) -> float:
    """Tokens/s of the swarm if every host served what it is bound for (`Standing.goal`); 0 if a block has no host.

    Raises:
        BadSpan: `num_blocks` is not a number of blocks that a model has.
    """
    check_num_blocks(num_blocks)
    if not standings:
        return 0.0
    inside = rates_inside(spans_of(standings), num_blocks)
    return float(flows(inside[None], np.ones((1, num_blocks)))[0])


def best_throughput(standings: Sequence[Standing], num_blocks: int) -> float:
    """Tokens/s that no placement of these hosts can exceed: everyone moved freely, and nothing lost to where spans end.

    A block needs at most t, so a host of capacity c is of use for c t at most; hence t blocks <= sum of min(rate, c t)
    over the hosts. Who is pinned counts with the length of its span. 0 if all together have no room for the model.

    Raises:
        BadSpan: `num_blocks` is not a number of blocks that a model has.
    """
    check_num_blocks(num_blocks)
    rooms = np.minimum([one.room for one in standings], num_blocks).astype(np.float64)
    rates = np.array([one.block_rate for one in standings], dtype=np.float64)
    if rooms.sum() < num_blocks:
        return 0.0
    order = np.argsort(rates / rooms, kind="stable")  # in this order hosts are used up as t grows
    used_up = np.cumsum(rates[order])
    rest = rooms.sum() - np.cumsum(rooms[order])
    needed = num_blocks - rest
    # With the first k used up: t = their rates / (blocks that the others cannot take whole); the least of these holds.
    with np.errstate(divide="ignore", invalid="ignore"):
        bounds = np.where(needed > 0, used_up / needed, np.inf)
    return float(bounds.min())


def even_levels(spans: Spans, num_blocks: int) -> Floats:
    """Tokens/s that each block gets if every host shares its time evenly among the blocks that it holds.

    That is one way to share, so the least of them is never more than the throughput; it is what a swarm does whose
    hosts cannot spend more time on blocks that others lack.
    """
    change = np.zeros(num_blocks + 1)
    shares = spans.rates / (spans.ends - spans.starts)
    np.add.at(change, spans.starts, shares)
    np.add.at(change, spans.ends, -shares)
    levels: Floats = np.cumsum(change)[:-1]
    levels[levels < _ROUNDING * spans.rates.sum()] = 0.0
    return levels


def rates_inside(spans: Spans, num_blocks: int) -> Floats:
    """An array [a, b] of the rates of the hosts whose span lies within [a, b), for all boundaries a <= b."""
    inside = np.zeros((num_blocks + 1, num_blocks + 1))
    np.add.at(inside, (np.minimum(spans.starts, num_blocks), np.minimum(spans.ends, num_blocks)), spans.rates)
    ended = np.cumsum(inside, axis=1)
    within: Floats = np.cumsum(ended[::-1], axis=0)[::-1]
    return within


def flows(inside_KAB: Floats, counted_KN: Floats) -> Floats:
    """Tokens/s of K placements, each given by its `rates_inside`, through the blocks N whose `counted_KN` is 1.

    Blocks with a 0 need no tokens, as if the model did not have them.
    """
    total_K = inside_KAB[:, 0, -1]
    flow_K = _flow_through_stretches(inside_KAB, counted_KN)
    going = np.arange(len(flow_K))
    for _ in range(inside_KAB.shape[1]):  # each step's worst set is smaller than the one before, so there are not more
        others, size = _worst_sets(inside_KAB[going], flow_K[going], counted_KN[going])
        total = total_K[going]
        short = (others + flow_K[going] * size > total * (1 + _ROUNDING)) & (size > 0)
        if not short.any():
            break
        holders = total - others
        holders[holders < total * _ROUNDING] = 0.0
        flow_K[going[short]] = holders[short] / size[short]
        going = going[short]
    return flow_K


def _flow_through_stretches(inside_KAB: Floats, counted_KN: Floats) -> Floats:
    """The least flow through any set of blocks without a gap: an upper bound, often the answer."""
    before_KA = np.concatenate([np.zeros((len(inside_KAB), 1)), np.cumsum(counted_KN, axis=1)], axis=1)
    size_KAB = before_KA[:, None, :] - before_KA[:, :, None]
    elsewhere_KAB = inside_KAB[:, 0, :, None] + inside_KAB[:, :, -1][:, None, :]
    total_K11 = inside_KAB[:, :1, -1:]
    holders_KAB = total_K11 - elsewhere_KAB
    holders_KAB[holders_KAB < total_K11 * _ROUNDING] = 0.0
    flow_KAB = np.divide(holders_KAB, size_KAB, out=np.full_like(holders_KAB, np.inf), where=size_KAB > 0)
    flow_K: Floats = flow_KAB.min(axis=(1, 2))
    return flow_K


def _worst_sets(inside_KAB: Floats, flow_K: Floats, counted_KN: Floats) -> tuple[Floats, Floats]:
    """The set of blocks whose holders are shortest of `flow_K` tokens/s: the rate of all other hosts, and its size.

    From left to right: up to each boundary, the last block is in the set, or a gap ends here that began anywhere.
    """
    num_placements, num_bounds = inside_KAB.shape[:2]
    value_KA = np.zeros((num_placements, num_bounds))
    size_KA = np.zeros((num_placements, num_bounds))
    row = np.arange(num_placements)
    for end in range(1, num_bounds):
        gap_KA = value_KA[:, :end] + inside_KAB[:, :end, end]
        start = gap_KA.argmax(axis=1)
        gap = gap_KA[row, start]
        counted = counted_KN[:, end - 1]
        with_block = value_KA[:, end - 1] + flow_K * counted
        inner = with_block > gap
        value_KA[:, end] = np.maximum(with_block, gap)
        size_KA[:, end] = np.where(inner, size_KA[:, end - 1] + counted, size_KA[row, start])
    return value_KA[:, -1] - flow_K * size_KA[:, -1], size_KA[:, -1]


def check_num_blocks(num_blocks: int) -> None:
    """Refuse what no model has.

    Raises:
        BadSpan: not from 1 to MAX_BLOCKS.
    """
    if not 1 <= num_blocks <= MAX_BLOCKS:
        raise BadSpan(f"a model of {num_blocks} blocks cannot be placed; use 1 to {MAX_BLOCKS}")
