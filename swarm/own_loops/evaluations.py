"""What a member's own evaluations gave, told to the run and added up with what others tell. On the node's loop."""

from __future__ import annotations

import asyncio
import logging

from swarm.own_loops.units import OwnUnits
from swarm.reports.metrics import Note
from swarm.training.evaluation_sums import Sums
from swarm.training.sums_of_all import SumsOfAll
from swarm.training.trainer import SwarmView

logger = logging.getLogger(__name__)


class OwnEvaluations:
    """Takes sums with `put`; `run` tells them. A round is told once."""

    def __init__(self, view: SwarmView, units: OwnUnits, note: Note) -> None:
        # Which adapter is best is not kept here: a loop saves its model itself.
        self.sums = SumsOfAll(view, note, lambda found, parts: None)
        self._units = units
        self._last = -1
        self._waiting: asyncio.Queue[tuple[int, Sums]] = asyncio.Queue()

    @property
    def announced(self) -> int | None:
        """The last round that was told, while others should wait for the next one: not once its adapter is trained on,
        or replaced by a later one, unmeasured.
        """
        behind = self._units.round - self._last
        is_awaited = behind == 0 or (behind == 1 and not any(each.steps for each in self._units.counted().values()))
        return self._last if self._last >= 0 and is_awaited else None

    def put(self, number: int, sums: Sums) -> None:
        """Sums of round `number`, to be told soon."""
        self._waiting.put_nowait((number, sums))

    async def run(self) -> None:
        """Tell what comes, until cancelled."""
        while True:
            number, sums = await self._waiting.get()
            try:
                await self._tell(number, sums)
            finally:
                self._waiting.task_done()

    async def finish(self, seconds: float) -> None:
        """Wait at most so long until all is told and added up."""
        try:
            async with asyncio.timeout(seconds):
                await self._waiting.join()
                await self.sums.finish(seconds)
        except TimeoutError:
            logger.info("left before all sums of held-out rows were in")

    async def close(self) -> None:
        """End what still waits for others."""
        await self.sums.close()

    async def _tell(self, number: int, sums: Sums) -> None:
        if number <= self._last:
            return
        if await self.sums.tell(number, sums):
            self._last = number
        self.sums.begin(number, sums)
