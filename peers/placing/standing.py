"""How a host stands among the others, as far as placement cares: what it holds, how fast it is, what it could hold.

Pure. Records say it, and what they leave out is read as: this host stays where it is.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from blocks.spans import Span
from peers.network import PeerId
from peers.records import PeerRecord

MAX_LOADING_SECONDS = 900.0  # who has not loaded its blocks by then is not counted on
_MOST_TIMES_TYPICAL = 1000.0  # a speed that is made up draws no more hosts away from its blocks than this
_MAX_SKEW_SECONDS = 5.0  # by which the clocks of honest peers may differ


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """One host. `block_rate` is blocks x tokens each second, `capacity` the most blocks that it can hold.

    `span` is what it serves now, if it is `serving`. `moves_to` is a promise: it is going to hold that span instead, or
    is loading it, and others need not. `since` is the DHT time at which it took its span or gave its promise; `moved`,
    whether it came to what it holds, or promised, by a move rather than as a newcomer. Who is `pinned` never moves.

    Raises:
        ValueError: a rate that is not finite and positive, or no room for a single block.
    """

    peer: PeerId
    span: Span
    block_rate: float
    capacity: int
    pinned: bool = False
    since: float = 0.0
    moved: bool = False
    moves_to: Span | None = None
    serving: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.block_rate < math.inf or self.capacity < 1:
            raise ValueError(
                f"{self.peer} computes {self.block_rate} blocks x tokens/s and has room for {self.capacity} blocks; "
                "use a finite rate above 0, and 1 block or more"
            )

    @property
    def goal(self) -> Span:
        """What it will hold once it has done what it promised."""
        return self.moves_to or self.span

    @property
    def room(self) -> int:
        """The most blocks that it can be made to hold: its capacity, or for who stays, what it holds."""
        held = len(self.goal)
        return held if self.pinned or held > self.capacity else self.capacity


def standings_of(records: Sequence[PeerRecord], num_blocks: int, now: float) -> list[Standing]:
    """What records say, one entry a host that serves or has promised to, ordered by peer id.

    A promise that is older than MAX_LOADING_SECONDS counts no more, nor does one from the future. Who has not measured
    its speed yet counts as the median of those who have, and nobody as more than 1,000 times that.
    """
    rates = {record.peer: _block_rate(record) for record in records}
    typical = statistics.median([rate for rate in rates.values() if rate > 0] or [1.0])
    standings: list[Standing] = []
    for record in sorted(records, key=lambda known: known.peer):
        span, goal = _clip(record.span, num_blocks), _clip(record.moves_to, num_blocks)
        if not now - MAX_LOADING_SECONDS <= record.since <= now + _MAX_SKEW_SECONDS:
            goal = None
        serving = "host" in record.roles and span is not None
        shown = span if serving else goal
        if shown is None:
            continue
        standings.append(
            Standing(
                peer=record.peer,
                span=shown,
                block_rate=min(rates[record.peer] or typical, _MOST_TIMES_TYPICAL * typical),
                capacity=max(1, record.capacity),
                pinned=record.pinned or record.capacity == 0,
                since=min(record.since, now),
                moved=record.moved,
                moves_to=goal,
                serving=serving,
            )
        )
    return standings


def _block_rate(record: PeerRecord) -> float:
    """Blocks x tokens each second, forward and backward, or forward alone where that is all it says; 0 if not even."""
    forward, backward = record.tokens_per_second, record.backward_tokens_per_second
    both = forward * backward / (forward + backward) if forward and backward else forward
    return both * len(record.span)


def _clip(span: Span | None, num_blocks: int) -> Span | None:
    """The part of `span` that the model has, if any."""
    return Span(span.start, min(span.end, num_blocks)) if span is not None and span.start < num_blocks else None
