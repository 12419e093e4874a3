"""Which span a newcomer should hold: the one that the swarm lacks most, as long as suits its device. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from blocks.errors import BadSpan
from blocks.spans import MAX_BLOCKS, Span
from peers.network import PeerId
from peers.placing.standing import Standing, standings_of
from peers.placing.throughput import check_num_blocks
from peers.records import PeerRecord

_SLOWER = 4.0  # times the common pace: so much longer may a hop through a slow host take


def pick_span(
    records: Sequence[PeerRecord],
    num_blocks: int,
    length: int,
    *,
    me: PeerId,
    now: float,
    block_rate: float | None = None,
) -> Span:
    """The span that the swarm lacks most, of `length` blocks at most: as many as fit here. `now` is DHT time.

    Compares, from the weakest block up, what the blocks of each candidate have now: a span that covers a block that
    nobody holds comes before any other, and one that covers two before one that covers one. What others have promised
    to hold counts as if they did. Spans that no other peer begins inside are not sought: a chain may use part of a
    span. Among equals the hash of this peer's id decides, so that two peers that start at the same moment and see the
    same records do not choose alike.

    `block_rate`, in blocks x tokens each second, shortens the span of a device that is slow for the memory that it has
    (see `suited_length`), though not so far that a gap stays open that it has room for; None: it is not known.

    Raises:
        BadSpan: `length` or `num_blocks` is not positive.
    """
    if length < 1 or num_blocks < 1:
        raise BadSpan(f"cannot place {length} of {num_blocks} blocks; both must be 1 or more")
    check_num_blocks(num_blocks)
    others = [one for one in standings_of(records, num_blocks, now) if one.peer != me]
    return pick_among(others, num_blocks, length, me=me, block_rate=block_rate)


def pick_among(
    others: Sequence[Standing], num_blocks: int, length: int, *, me: PeerId, block_rate: float | None = None
) -> Span:
    """As `pick_span`, next to hosts whose standings are known; `length` and `num_blocks` are positive."""
    level = [0.0] * num_blocks
    for one in sorted(others, key=lambda known: known.peer):  # one order of summing: equal sums are equal bits
        goal = one.goal
        share = one.block_rate / len(goal)
        for block in goal.blocks():
            level[block] += share
    length = min(length, num_blocks)
    if block_rate is not None:
        length = min(length, max(suited_length(common_pace(others), block_rate), _longest_gap(level)))
    needs = {start: sorted(level[start : start + length]) for start in range(num_blocks - length + 1)}
    least = min(needs.values())
    equals = [start for start, need in needs.items() if need == least]
    preferred = _aligned(equals, length, num_blocks)
    start = preferred[draw(me) % len(preferred)]
    return Span(start, start + length)


def common_pace(standings: Sequence[Standing]) -> float:
    """Tokens/s through a typical span: all rates over all numbers of blocks; 0 if there is nobody."""
    return sum(one.block_rate for one in standings) / max(1, sum(len(one.goal) for one in standings))


def suited_length(pace: float, block_rate: float) -> int:
    """The most blocks with which a host's own pace, its rate by its blocks, is at least a quarter of the common one.

    So every hop of a chain takes about as long: a slow device with much memory does not hold up the chains that go
    through it, and a fast one may hold all that fits.
    """
    return max(1, min(MAX_BLOCKS, int(_SLOWER * block_rate / pace))) if pace else MAX_BLOCKS


def draw(peer: PeerId) -> int:
    """A number that decides among equals: the same to everybody, and nobody's choice."""
    return int.from_bytes(hashlib.sha256(peer.encode()).digest()[:8], "big")


def _longest_gap(level: Sequence[float]) -> int:
    """How many blocks in a row nobody holds, at most."""
    longest = run = 0
    for one in level:
        run = run + 1 if one == 0 else 0
        longest = max(longest, run)
    return longest


def _aligned(starts: Sequence[int], length: int, num_blocks: int) -> Sequence[int]:
    """Of equal starts those that tile the model, from either end, if there are any: few gaps and long hops."""
    tiles = [start for start in starts if start % length == 0 or (num_blocks - start) % length == 0]
    return tiles or starts
