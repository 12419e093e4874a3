"""Which span a new peer should hold: the one that needs it most. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from blocks.errors import BadSpan
from blocks.spans import Span
from peers.network import PeerId
from peers.records import PeerRecord

_SLOWEST_TOKENS_PER_SECOND = 1e-3  # a host that says 0 still holds the block: less than nobody it is not


def pick_span(records: Sequence[PeerRecord], num_blocks: int, length: int, *, me: PeerId) -> Span:
    """The span of `length` blocks (at most the model's) that the fewest peers hold, weighted by throughput.

    Compares, from the weakest block up, what the blocks of each candidate have now: a span that covers a block that
    nobody holds comes before any other, and one that covers two before one that covers one. Spans that no other peer
    begins inside are not sought: a chain may use part of a span. Among equals the hash of this peer's id decides, so
    that two peers that start at the same moment and see the same records do not choose alike.

    Raises:
        BadSpan: `length` or `num_blocks` is not positive.
    """
    if length < 1 or num_blocks < 1:
        raise BadSpan(f"cannot place {length} of {num_blocks} blocks; both must be 1 or more")
    length = min(length, num_blocks)
    speed = [0.0] * num_blocks
    for record in sorted(records, key=lambda known: known.peer):  # one order of summing: equal sums are equal bits
        if record.peer != me and "host" in record.roles:
            for block in range(record.span.start, min(record.span.end, num_blocks)):
                speed[block] += max(record.tokens_per_second, _SLOWEST_TOKENS_PER_SECOND)
    needs = {start: sorted(speed[start : start + length]) for start in range(num_blocks - length + 1)}
    least = min(needs.values())
    equals = [start for start, need in needs.items() if need == least]
    preferred = _aligned(equals, length, num_blocks)
    draw = int.from_bytes(hashlib.sha256(me.encode()).digest()[:8], "big")
    start = preferred[draw % len(preferred)]
    return Span(start, start + length)


def _aligned(starts: Sequence[int], length: int, num_blocks: int) -> Sequence[int]:
    """Of equal starts those that tile the model, from either end, if there are any: few gaps and long hops."""
    tiles = [start for start in starts if start % length == 0 or (num_blocks - start) % length == 0]
    return tiles or starts
