"""A loop's own evaluation as sums that a run can add up: only what was measured with exactly the adapter of one round.

All methods belong in the loop's thread, and outside of its steps.
"""

from __future__ import annotations

import logging
from typing import Protocol

from torch import nn

from blocks.checks import check_whole
from swarm.errors import BadConfig
from swarm.own_loops.counting import HeldOutCounter
from swarm.own_loops.step_gate import Stance
from swarm.own_loops.taking_part import TakingPart
from swarm.peer import Peer
from swarm.training.evaluation_sums import Sums, add_up

logger = logging.getLogger(__name__)


class Told(Protocol):
    """Who takes a loop's sums; ToldRun."""

    def shared_round(self) -> int | None:
        """Which round's adapter is in the model; None if it has been trained since, or nobody can be told."""

    def tell(self, number: int, sums: Sums) -> None:
        """What was measured with that of round `number`."""


class ToldRun:
    """The run, through the member's own peer. Implements Told."""

    def __init__(self, peer: Peer, part: TakingPart) -> None:
        self._peer, self._part = peer, part

    def shared_round(self) -> int | None:
        """See Told."""
        if self._part.units.gate.stance == Stance.TRAINING or self._peer.node.failure() is not None:
            return None
        return self._peer.loop.run(self._part.units.shared_round())

    def tell(self, number: int, sums: Sums) -> None:
        """See Told."""
        self._peer.loop.loop.call_soon_threadsafe(self._part.evaluations.put, number, sums)


class HeldOut:
    """A loop's evaluations, each from `begin` to `end`, until `close`."""

    def __init__(self, module: nn.Module, told: Told) -> None:
        self._counter, self._told = HeldOutCounter(module), told
        self._has_begun, self._is_clear, self._is_closed = False, True, False
        self._round: int | None = None
        self._given: Sums | None = None
        self._found: list[Sums] = []

    def forget(self) -> None:
        """What was measured until now belongs to no evaluation."""
        self._counter.take()
        self._has_begun, self._is_clear = False, True
        self._round, self._given, self._found = None, None, []

    def begin(self) -> None:
        """An evaluation is under way; what was measured since `forget` belongs to it. Safe to call again."""
        if not self._has_begun and not self._is_closed:
            self._has_begun = True
            self._round = self._told.shared_round()

    def give(self, mean: float | None, tokens: int) -> None:
        """What the loop has measured itself counts, in place of what its forward passes gave.

        Raises:
            BadConfig: no evaluation is under way, or these are no mean and no number of tokens.
        """
        check_whole(BadConfig, "held_out_tokens", tokens, 1)
        if mean is None or not self._has_begun:
            raise BadConfig(
                "held_out_tokens goes with held_out, while an evaluation is under way;"
                " report both inside `with member.evaluation():`"
            )
        self._given = Sums(loss=mean * tokens, tokens=tokens)

    def take_set(self, passes: int | None = None) -> None:
        """All rows of one set have gone through the model, in so many forward passes; another set may follow."""
        sums = self._counter.take(passes)
        sums, self._given = self._given or sums, None
        if sums is None or self._round is None or self._told.shared_round() != self._round:
            self._is_clear = False
        else:
            self._found.append(sums)

    def end(self) -> None:
        """The evaluation is over: tell its sums, where they are whole and of one round's adapter."""
        number, found, is_clear = self._round, self._found, self._is_clear and self._has_begun
        self.forget()
        if number is not None and found and is_clear:
            self._told.tell(number, add_up(found, b""))
        elif number is not None and found:
            logger.info("what was measured with round %d is not told: some of it cannot be summed", number)

    def close(self) -> None:
        """Tell what is not told yet, and count no more."""
        self.end()
        self._is_closed = True
        self._counter.close()
