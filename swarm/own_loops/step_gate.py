"""Lets the network's side at parameters that a training loop in another thread owns: only where that loop allows it.

The loop says what may be done now (its `Stance`); the network's side asks for what it needs and is let in when the
stance allows it. While somebody is in, the loop does not go on to what would disturb him.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import IntEnum

_LOOK_SECONDS = 0.05
_FADING = 0.9


class Stance(IntEnum):
    """What others may do with the parameters now: nothing while they are trained; read; read and write."""

    TRAINING = 0
    READING = 1
    FREE = 2


@dataclass(eq=False, slots=True)
class _Visit:
    needs: Stance
    loop: asyncio.AbstractEventLoop
    entered: asyncio.Future[None]
    is_in: bool = False


class StepGate:
    """One training loop's gate. It is free until the first `train`, and again after `rest`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.patience_seconds = 20.0
        """How long the loop may be away from its boundaries before nobody waits for it; longer where its steps are."""
        self.step_seconds = 0.0
        """How long the loop was away from its boundaries at most, lately."""
        self._clock, self._left_at = clock, clock()
        self._changed = threading.Condition()
        self._stance = Stance.FREE
        self._visits: list[_Visit] = []

    @property
    def stance(self) -> Stance:
        """What may be done now."""
        return self._stance

    def train(self, wait_while: Callable[[], bool] | None = None) -> None:
        """The loop is at a boundary, and trains when this returns: when all visits are over, those that were waiting
        included, and `wait_while` is false.
        """
        with self._changed:
            if self._stance == Stance.TRAINING:
                self.step_seconds = max(_FADING * self.step_seconds, self._clock() - self._left_at)
            self._take(Stance.FREE)
            while self._visits or (wait_while is not None and wait_while()):
                self._changed.wait(_LOOK_SECONDS)
            self._stance = Stance.TRAINING
            self._left_at = self._clock()

    def read(self) -> None:
        """The loop uses the parameters and does not change them until its next `train`, as in an evaluation."""
        with self._changed:
            while any(visit.needs == Stance.FREE and visit.is_in for visit in self._visits):
                self._changed.wait(_LOOK_SECONDS)
            self._take(Stance.READING)

    def rest(self) -> None:
        """The loop does not touch the parameters until its next `train`."""
        with self._changed:
            self._take(Stance.FREE)

    def is_late(self) -> bool:
        """Whether the loop has not come to a boundary for so long that nobody should wait for it."""
        away_seconds = self._clock() - self._left_at
        return self._stance == Stance.TRAINING and away_seconds > max(self.patience_seconds, 4 * self.step_seconds)

    @asynccontextmanager
    async def visit(self, needs: Stance) -> AsyncIterator[None]:
        """Inside, at least `needs` may be done. Visits nest, if only the outer one may be waited for."""
        loop = asyncio.get_running_loop()
        visit = _Visit(needs=needs, loop=loop, entered=loop.create_future())
        with self._changed:
            self._visits.append(visit)
            self._let_in()
            self._changed.notify_all()
        try:
            await visit.entered
            yield
        finally:
            with self._changed:
                self._visits.remove(visit)
                self._changed.notify_all()

    def _take(self, stance: Stance) -> None:
        self._stance = stance
        self._let_in()

    def _let_in(self) -> None:
        """In either thread, with the lock."""
        for visit in self._visits:
            if not visit.is_in and visit.needs <= self._stance:
                visit.is_in = True
                visit.loop.call_soon_threadsafe(_enter, visit.entered)


def _enter(entered: asyncio.Future[None]) -> None:
    if not entered.done():  # the visitor may have given up
        entered.set_result(None)
