"""Who moves to other blocks, and when. Pure: everybody computes the same from the same records, and one moves.

A block that nobody holds is filled at once. Else somebody moves only where that clearly gains throughput, after it has
stood for a while, and not soon after another move, so that records can settle. The elected peer promises its new span
in its record, waits `settle_seconds` while it serves on, and asks `still_right` with records read anew, which holds
back whoever promised too much because views differed. So no two leave the last places of a block at once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from blocks.spans import Span
from peers.network import PeerId
from peers.placing.making_room import room_for
from peers.placing.move_choices import Choices, Everybody, choice_of, choices_of, soft_minimum, throughput_after
from peers.placing.placement import draw
from peers.placing.standing import Standing
from peers.placing.throughput import Floats, best_throughput, check_num_blocks, even_levels, throughput

_WIDENING = 1.25  # times the throughput: what it is worth that a mover keeps all the blocks that it serves
_ROUNDING = 1e-9
_SETTLED = 4  # times settle_seconds: no move for balance comes sooner after another, however much there is to gain
_KEPT_HOLDERS = 2  # of a block that somebody leaves for a better balance

Reason: TypeAlias = Literal["gap", "room", "balance"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MovingRules:
    """When a swarm that lacks no block moves somebody.

    Never while throughput is within `shortfall` of the best and no block's even level is under `even` times it (see
    throughput.even_levels); only where a move gains as much as `gain` average hosts are of the swarm; only by a peer
    that has held its span for `stand_seconds`; and `cooldown_seconds` after any other move, or sooner, in proportion,
    where throughput is far from the best. `settle_seconds` lie between a promise and the look at records anew: longer
    than a record takes to be seen. Who was elected and promised nothing for `turn_seconds` is passed over.
    """

    shortfall: float = 0.08
    even: float = 0.85
    gain: float = 1.0
    stand_seconds: float = 300.0
    cooldown_seconds: float = 60.0
    settle_seconds: float = 4.0
    turn_seconds: float = 20.0

    def __post_init__(self) -> None:
        if not (0 <= self.shortfall < 1 and 0 <= self.even < 1 and self.gain > 0):
            raise ValueError(
                f"moving: shortfall is {self.shortfall}, even {self.even} and gain {self.gain}; use shares from 0 to 1 "
                "for the first two, and a gain above 0, or nobody ever stands still"
            )
        if min(self.stand_seconds, self.cooldown_seconds, self.settle_seconds) < 0 or self.turn_seconds <= 0:
            raise ValueError("moving: a number of seconds is negative; use 0 or more, and turn_seconds above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """`peer` should hold `span` instead of `leaves`.

    To fill a "gap" that nobody holds, to make "room" by taking over blocks from one that then can fill it, or for a
    better "balance".
    """

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
    place; one that can keep its blocks and hold those of the gap beside them is preferred. Where nobody can, somebody
    takes over from one that could then. Nobody leaves a block that
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
        choices = choices_of(everybody, free, keep=1)
        if choices is not None:
            return _first(everybody, choices, throughput_after(everybody, choices), "gap")
        room = room_for(everybody, free)
        return room and _move(everybody, *room, "room")
    lack = _lack(everybody, rules)
    if lack is None or any(one.moved and one.since > now - lack.cooldown_seconds for one in standings):
        return None
    stood = [place for place in free if everybody.standings[place].since <= now - rules.stand_seconds]
    choices = choices_of(everybody, stood, keep=min(_KEPT_HOLDERS, int(everybody.stays_N.min())))
    if choices is None:
        return None
    after_C = throughput_after(everybody, choices)
    gains_C = _gains(everybody, choices, after_C, lack.throughput, rules)
    return _first(everybody, choices.take(np.flatnonzero(gains_C)), after_C[gains_C], "balance")


def still_right(
    move: Move,
    standings: Sequence[Standing],
    num_blocks: int,
    now: float,
    *,
    rules: MovingRules = MovingRules(),
) -> bool:
    """Whether `move`, promised by its peer in `standings` read anew, should be made now.

    No, if it leaves a block that no other serves and has not promised to leave: of two that would leave the last places
    of a block, whoever sees the other's promise stays, whatever their clocks say. Else the promises that were given
    before this one, by DHT time and then peer id, count as kept and later ones as withdrawn, as who gave them asks the
    same: a gap must still be one, and a move for balance must still gain, and be no sooner after another than it may.

    Raises:
        BadSpan: `num_blocks` is not a number of blocks that a model has.
    """
    check_num_blocks(num_blocks)
    own = next((one for one in standings if one.peer == move.peer), None)
    if own is None or not own.serving or own.span != move.leaves or own.goal != move.span:
        return False
    others = [one for one in standings if one.peer != move.peer]
    stays_N = Everybody.of(others, num_blocks).stays_N
    if any(stays_N[block] < 1 for block in move.leaves.blocks() if block not in move.span):
        return False
    before = [
        one
        if one.moves_to is None or not one.serving or (one.since, one.peer) < (own.since, own.peer)
        else replace(one, moves_to=None, moved=False)
        for one in others
    ]
    everybody = Everybody.of([*before, replace(own, moves_to=None)], num_blocks)
    if everybody.gap_N.any():
        return move.reason == "room" or bool(everybody.gap_N[move.span.start : move.span.end].any())
    if move.reason == "room":
        return False
    lack = _lack(everybody, rules)
    if lack is None or any(one.moved and one.since > own.since - lack.cooldown_seconds for one in before):
        return False
    choice = choice_of(everybody, move.peer, move.span)
    return bool(_gains(everybody, choice, throughput_after(everybody, choice), lack.throughput, rules)[0])


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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Lack:
    """What a swarm without gaps does now, when that is too little, and how long after a move the next may come."""

    throughput: float
    cooldown_seconds: float


def _lack(everybody: Everybody, rules: MovingRules) -> _Lack | None:
    """None where nobody needs to move: throughput is near the best, and even levels are not far from it."""
    now = throughput(everybody.standings, everybody.num_blocks)
    best = best_throughput(everybody.standings, everybody.num_blocks)
    even = even_levels(everybody.spans, everybody.num_blocks).min()
    if now >= (1 - rules.shortfall) * best and even >= rules.even * best:
        return None
    cooldown = max(rules.settle_seconds * _SETTLED, rules.cooldown_seconds * now / best)
    return _Lack(throughput=now, cooldown_seconds=cooldown)


def _gains(
    everybody: Everybody, choices: Choices, after_C: Floats, before: float, rules: MovingRules
) -> npt.NDArray[np.bool_]:
    """Which choices are clearly better than to stay: in throughput, or without loss of it, in the soft minimum.

    Neither can fall back without the other having risen, so moves among unchanged records come to an end.
    """
    gain = 1 + rules.gain / len(everybody.standings)
    soft, soft_C = soft_minimum(everybody, choices)
    clear: npt.NDArray[np.bool_] = (after_C >= before * gain) | (
        (after_C >= before * (1 - _ROUNDING)) & (soft_C >= soft * gain)
    )
    return clear


def _first(everybody: Everybody, choices: Choices, after_C: Floats, reason: Reason) -> Move | None:
    """The choice with the most throughput; of equals the evenest, then the shortest, then by the peer's draw."""
    found: list[tuple[tuple[float, ...], Move]] = []
    columns = (choices.place_C, choices.start_C, choices.end_C, after_C, choices.cost_C)
    for place, start, end, after, cost in zip(*columns, strict=True):
        move = _move(everybody, place, Span(int(start), int(end)), reason)
        worth = float(f"{after * (_WIDENING if move.widens else 1.0):.6g}")  # sums in another order are equal again
        found.append(((worth, -float(f"{cost:.6g}"), -len(move.span), draw(move.peer), -start), move))
    return max(found, key=lambda entry: entry[0])[1] if found else None


def _move(everybody: Everybody, place: int, span: Span, reason: Reason) -> Move:
    one = everybody.standings[place]
    return Move(peer=one.peer, leaves=one.span, span=span, reason=reason)
