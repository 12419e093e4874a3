"""When a holder writes its checkpoint: with every k-th round of the run, or the first that it comes to after that."""

from __future__ import annotations

import logging

from swarm.errors import BadCheckpoint
from swarm.units.holder import Holder

logger = logging.getLogger(__name__)


class Saver:
    """Writes one holder's checkpoints; `every` is the run's number of rounds from one to the next."""

    def __init__(self, host: Holder, every: int) -> None:
        self._host, self._every = host, every
        self._saved = host.round

    async def after_round(self) -> None:
        """Write what is due. A round that this host missed, or a disk that was full, costs no further k rounds."""
        number = self._host.round
        if number // self._every <= self._saved // self._every:
            return
        try:
            await self._host.checkpoint()
        except BadCheckpoint as error:
            logger.error("%s", error)  # training goes on: the other holders have it too
        else:
            self._saved = number
