"""Held-out rows after each round: measured here, told to the swarm as sums, and everybody's added up.

Rows stay with their trainer. How what they give is told and added up is sums_of_all's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from swarm.reports.metrics import Note
from swarm.training.best_adapter import BestAdapter
from swarm.training.evaluation_sums import Evaluation, Sums, evaluation_of
from swarm.training.sums_of_all import SumsOfAll, numbers_of
from swarm.training.trainer import SwarmView

logger = logging.getLogger(__name__)

_SETTLE_SECONDS = 10.0  # until all hosts have announced a round that the first has done
_SETTLE_POLL_SECONDS = 0.25
_KEPT_ROUNDS = 2  # before its newest one, of which a host has the adapter still


class Validation:
    """Measures with `measure_round`, tells the others, and keeps the best adapter. Implements train.Measuring."""

    def __init__(
        self,
        measure_round: Callable[[int], Awaitable[Sums]],
        view: SwarmView,
        keeping: BestAdapter,
        note: Note,
    ) -> None:
        self.own: list[Evaluation] = []
        self._measure, self._view, self._keeping, self._note = measure_round, view, keeping, note
        self._attempted = self._measured = -1
        self._is_over = False
        self._sums = SumsOfAll(view, note, keeping.settle)

    @property
    def summed(self) -> Sequence[Evaluation]:
        """See Measuring."""
        return self._sums.summed

    @property
    def announced(self) -> int | None:
        """See Measuring."""
        return None if self._is_over or self._measured < 0 else self._measured

    def is_due(self) -> bool:
        """See Measuring."""
        return self._view.round() > self._attempted

    async def measure(self) -> None:
        """See Measuring; a round that was measured already is not again.

        Raises:
            NoRoute, Refused: as forward passes do.
        """
        is_settled = await self._settled()
        number = self._attempted = self._view.round()
        if number == self._measured:
            return
        sums = await self._measure(number)
        self._take_own(evaluation_of(number, sums))
        await self._view.refresh()
        if not is_settled or self._view.round() > number + _KEPT_ROUNDS:
            logger.info("round %d was measured while hosts stood at other rounds: its sums are not told", number)
            return
        self._measured = number
        is_shared = await self._sums.tell(number, sums)
        parts = {str(self._view.me): (sums.loss, sums.tokens)}
        # Where there are others, only the sum will say whether this is the best, and then it may be too late to get it.
        if (is_shared and await self._sums.others()) or self._keeping.is_better(self.own[-1], parts):
            await self._keeping.fetch(number)
        self._sums.begin(number, sums)

    def end(self) -> None:
        """No further round will be measured, and nobody need wait for one."""
        self._is_over = True

    async def finish(self, seconds: float) -> None:
        """Wait at most so long for the others' sums."""
        await self._sums.finish(seconds)

    async def close(self) -> None:
        """End what still waits for others."""
        await self._sums.close()
        self._keeping.close()

    def _take_own(self, found: Evaluation) -> None:
        self.own.append(found)
        self._note("evaluation", numbers_of(found))
        logger.info("evaluated round=%d loss=%.4f tokens=%d", found.round, found.loss, found.tokens)

    async def _settled(self) -> bool:
        """Whether all hosts stand at the newest round, after a while in which they may come to it."""
        began = self._view.dht_time()
        while True:
            await self._view.refresh()
            if self._view.is_settled(self._view.round()):
                return True
            if abs(self._view.dht_time() - began) >= _SETTLE_SECONDS:
                return False
            await asyncio.sleep(_SETTLE_POLL_SECONDS)
