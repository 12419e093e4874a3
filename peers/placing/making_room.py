"""Who could take over blocks from another, so that the other is free to fill a gap. Pure.

For swarms whose memory is tight: nobody can fill the gap and keep what only it holds, but two can, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from blocks.spans import Span
from peers.placing.move_choices import Everybody, Ints, kept
from peers.placing.placement import draw
from peers.placing.standing import Standing

_MOST_HOSTS = 48  # among more somebody can be spared as a rule, and looking at all pairs takes too long


def room_for(everybody: Everybody, movers: Sequence[int]) -> tuple[int, Span] | None:
    """Who of `movers` (places in the standings) should hold which span, so that another can fill a gap; or None.

    It keeps all blocks that no other serves. The one that loads least is taken.
    """
    if len(movers) > _MOST_HOSTS:
        return None
    gap = np.flatnonzero(everybody.gap_N)
    blocks = np.arange(everybody.num_blocks)
    found: list[tuple[int, int, int, int, Span]] = []
    for place in movers:
        one = everybody.standings[place]
        first, last = kept(one.span, everybody.stays_N)
        length = min(one.capacity, everybody.num_blocks)
        start_W = np.arange(max(0, last - length), min(first, everybody.num_blocks - length) + 1)[:, None]
        stays_N = everybody.stays_N - ((one.span.start <= blocks) & (blocks < one.span.end))
        stays_WN = stays_N + ((start_W <= blocks) & (blocks < start_W + length))
        can_W = np.zeros(len(start_W), dtype=np.bool_)
        for other in movers:
            if other != place:
                can_W |= _can_fill(everybody.standings[other], gap, stays_WN)
        for start in start_W[can_W, 0]:
            span = Span(int(start), int(start) + length)
            loaded = sum(block not in one.span for block in span.blocks())
            found.append((loaded, draw(one.peer), span.start, place, span))
    if not found:
        return None
    *_, place, span = min(found)
    return place, span


def _can_fill(one: Standing, gap: Ints, stays_WN: Ints) -> npt.NDArray[np.bool_]:
    """Whether a host has room for some block of a gap beside all that it alone would serve, if so many stay; W ways."""
    few_WL = stays_WN[:, one.span.start : one.span.end] < 2
    first_W1 = one.span.start + few_WL.argmax(axis=1)[:, None]
    last_W1 = one.span.end - few_WL[:, ::-1].argmax(axis=1)[:, None]
    needed_W = (np.maximum(last_W1, gap + 1) - np.minimum(first_W1, gap)).min(axis=1)
    can: npt.NDArray[np.bool_] = ~few_WL.any(axis=1) | (needed_W <= one.capacity)
    return can
