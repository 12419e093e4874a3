"""Who moves to other blocks, and when. Pure: everybody computes the same from the same records, and one moves.

A block that nobody holds is filled at once. Else somebody moves only where that clearly gains throughput, after it has
stood for a while, and not soon after another move, so that records can settle. The elected peer promises its new span
in its record, waits `settle_seconds` while it serves on, and asks `still_right` with records read anew: of two that
promised at once, by views that differed, the later one stays. So no two leave the last holders' places of a block.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np

from blocks.spans import Span
from peers.move_choices import Choices, Everybody, choices_of, soft_minimum, throughput_after
from peers.network import PeerId
from peers.placement import draw
from peers.standing import Standing
from peers.throughput import Floats, best_throughput, check_num_blocks, even_levels, throughput

_WIDENING = 1.25  # times the throughput: what it is worth that a mover keeps all the blocks that it serves
_ROUNDING = 1e-9
_KEPT_HOLDERS = 2  # of a block that somebody leaves for a better balance

Reason: TypeAlias = Literal["gap", "balance"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MovingRules:
    """When a swarm that lacks no block moves somebody.

    Never while throughput is within `shortfall` of the best; only where the move gains a share of `gain`, by a peer
    that has held its span for `stand_seconds`, and `cooldown_seconds` after any other move. `settle_seconds` lie
    between a promise and the look at records anew; a peer that was elected and promised nothing for `turn_seconds` is
    passed over.
    """

    shortfall: float = 0.08
    even: float = 0.85
    gain: float = 1.0
    stand_seconds: float = 300.0
    cooldown_seconds: float = 60.0
    settle_seconds: float = 4.0
    turn_seconds: float = 20.0

    def __post_init__(self) -> None:
        if not (0 <= self.shortfall < 1 and self.gain > 0):
            raise ValueError(
                f"moving.shortfall is {self.shortfall} and moving.gain {self.gain}; use shares between 0 and 1"
            )
        if min(self.stand_seconds, self.cooldown_seconds, self.settle_seconds) < 0 or self.turn_seconds <= 0:
            raise ValueError("moving: a number of seconds is negative; use 0 or more, and turn_seconds above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """`peer` should hold `span` instead of `leaves`: to fill a "gap" that nobody holds, or for a better "balance"."""

    peer: PeerId
    leaves: Span
    span: Span
    reason: Reason

    @property
    def widens(self) -> bool:
        """Whether the peer keeps all blocks that it serves."""
        return self.span.covers(self.leaves)


def next_move(
    standings: Sequence[Standing],
    num_blocks: int,
    now: float,
    *,
    rules: MovingRules = MovingRules(),
    passed_over: Collection[PeerId] = (),
) -> Move | None:
    """The one move that should come next, or None. `now` is DHT time in seconds.

    A gap goes to the peer with which the swarm is fastest afterwards, so to the one that loses least by leaving its
    place; one that can keep its blocks and hold those of the gap beside them is preferred. Nobody leaves a block that
    no other serves. Who is pinned, has promised to move already, is still loading, or is `passed_over`, does not move.

    Raises:
        BadSpan: `num_blocks` is not a number of blocks that a model has.
    """
    check_num_blocks(num_blocks)
    if not standings:
        return None
    everybody = Everybody.of(standings, num_blocks)
    free = [
        place
        for place, one in enumerate(everybody.standings)
        if one.serving and not one.pinned and one.moves_to is None and one.peer not in passed_over
    ]
    if everybody.gap_N.any():
        return _best(everybody, free, "gap", rules)
    if any(one.moved and one.since > now - rules.cooldown_seconds for one in standings):
        return None
    stood = [place for place in free if everybody.standings[place].since <= now - rules.stand_seconds]
    return _best(everybody, stood, "balance", rules)


def still_right(
    move: Move,
    standings: Sequence[Standing],
    num_blocks: int,
    now: float,
    *,
    rules: MovingRules = MovingRules(),
) -> bool:
    """Whether `move`, promised by its peer in `standings` read anew, should be made now.

    Promises that were given before it count as kept, later ones as withdrawn, as who gave them asks the same: a gap
    must still be one, a balance must not have been moved towards already, and nobody leaves a block that no other
    serves and stays at. So of two that promised within sight of each other the earlier goes, by DHT time, then peer id.

    Raises:
        BadSpan: `num_blocks` is not a number of blocks that a model has.
    """
    check_num_blocks(num_blocks)
    own = next((one for one in standings if one.peer == move.peer), None)
    if own is None or not own.serving or own.span != move.leaves or own.goal != move.span:
        return False
    mine = (own.since, own.peer)
    others = [
        one if not one.serving or (one.since, one.peer) < mine else replace(one, moves_to=None)
        for one in standings
        if one.peer != move.peer
    ]
    everybody = Everybody.of(others, num_blocks)
    left = [block for block in move.leaves.blocks() if block not in move.span]
    if any(everybody.stays_N[block] < 1 for block in left):
        return False
    if move.reason == "gap":
        filled = [block for block in move.span.blocks() if block not in move.leaves]
        return bool(everybody.gap_N[filled].any())
    return not any(one.moved and own.since - rules.cooldown_seconds < one.since for one in others if one.moves_to)


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """Whom one peer sees elected, since when, and who let its turn go by: it may be old, asleep, or unable to load."""

    elected: PeerId | None = None
    since: float = 0.0
    passed_over: frozenset[PeerId] = frozenset()

    def after(self, move: Move | None, now: float, rules: MovingRules = MovingRules()) -> Turn:
        """What to remember once `next_move(..., passed_over=turn.passed_over)` has said `move`."""
        if move is None:
            # Nobody is needed any more, or everybody had a turn; either way the next time begins with all.
            return Turn()
        if move.peer != self.elected:
            return replace(self, elected=move.peer, since=now)
        if now - self.since >= rules.turn_seconds:
            return Turn(passed_over=self.passed_over | {move.peer})
        return self


def _best(everybody: Everybody, movers: Sequence[int], reason: Reason, rules: MovingRules) -> Move | None:
    """The best move of one of `movers` (places in the standings)."""
    before = 0.0
    if reason == "balance":
        before = throughput(everybody.standings, everybody.num_blocks)
        best = best_throughput(everybody.standings, everybody.num_blocks)
        even = even_levels(everybody.spans, everybody.num_blocks).min()
        if before >= (1 - rules.shortfall) * best and even >= rules.even * best:
            return None
    keep = 1 if reason == "gap" else min(_KEPT_HOLDERS, int(everybody.stays_N.min()))
    choices = choices_of(everybody, movers, keep) if movers else None
    if choices is None:
        return None
    after_C = throughput_after(everybody, choices)
    if reason == "balance":
        soft, soft_C = soft_minimum(everybody, choices)
        gain = rules.gain / len(everybody.standings)
        gains = after_C >= before * (1 + gain)
        evens = (after_C >= before * (1 - _ROUNDING)) & (soft_C >= soft * (1 + gain))
        choices, after_C = choices.take(np.flatnonzero(gains | evens)), after_C[gains | evens]
    return _first(everybody, choices, after_C, reason)


def _first(everybody: Everybody, choices: Choices, after_C: Floats, reason: Reason) -> Move | None:
    """The choice with the most throughput; of equals the evenest, then the shortest, then by the peer's draw."""
    found: list[tuple[tuple[float, ...], Move]] = []
    columns = (choices.place_C, choices.start_C, choices.end_C, after_C, choices.cost_C)
    for place, start, end, after, cost in zip(*columns, strict=True):
        one = everybody.standings[place]
        move = Move(peer=one.peer, leaves=one.span, span=Span(int(start), int(end)), reason=reason)
        worth = float(f"{after * (_WIDENING if move.widens else 1.0):.6g}")  # sums in another order are equal again
        found.append(((worth, -float(f"{cost:.6g}"), -len(move.span), draw(one.peer), -start), move))
    return max(found, key=lambda entry: entry[0])[1] if found else None
