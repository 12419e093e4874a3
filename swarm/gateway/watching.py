"""Looks at the swarms again and again: often while somebody reads of them, else now and then."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peers.errors import PeerError
from swarm.gateway.sightings import Sightings
from swarm.reports.status import unserved

if TYPE_CHECKING:
    from peers.published.catalogue import Published
    from swarm.peer import Peer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchConfig:
    """Seconds between two looks while somebody reads, and while nobody has for `reader_seconds`."""

    often_seconds: float = 2.0
    seldom_seconds: float = 10.0
    reader_seconds: float = 15.0


class SwarmWatch:
    """What is known of each peer's swarm. Start `run()` in a task."""

    def __init__(
        self,
        peers: Sequence[Peer],
        config: WatchConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.sightings = {peer: Sightings() for peer in peers}
        self._config, self._clock, self._wall_clock = config, clock, wall_clock
        self._read_at = float("-inf")
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Look until cancelled.

        Raises:
            PeerError: a peer cannot go on, as its p2pd ended.
        """
        while True:
            self._wake.clear()
            await asyncio.sleep(self._config.often_seconds)
            if self._clock() - self._read_at >= self._config.reader_seconds:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._config.seldom_seconds - self._config.often_seconds):
                        await self._wake.wait()
            await self.look()

    async def look(self) -> None:
        """Look at all swarms now.

        Raises:
            PeerError: a peer cannot go on, as its p2pd ended.
        """
        await asyncio.gather(*(self._look(peer) for peer in self.sightings))

    def read(self) -> dict[Peer, Sightings]:
        """What is known now; somebody reads it, so the next looks come soon."""
        self._read_at = self._clock()
        self._wake.set()
        return self.sightings

    def is_live(self, peer: Peer) -> bool:
        """Whether every block of a peer's run had a holder at the last look."""
        return not self.sightings[peer].unserved

    def published(self) -> dict[Peer, tuple[Published, ...]]:
        """The adapters that each run had published at the last look."""
        seen = self.sightings.items()
        return {peer: () if each.status is None else each.status.catalogue.adapters for peer, each in seen}

    def unserved(self) -> dict[str, list[int]]:
        """Blocks without a live holder, by the name of the run that lacks them."""
        return {peer.node.spec.name: list(seen.unserved) for peer, seen in self.sightings.items() if seen.unserved}

    async def _look(self, peer: Peer) -> None:
        await asyncio.to_thread(lambda: peer.run(peer.node.wait(0)))  # one that cannot go on says so here
        try:
            gaps = await asyncio.to_thread(lambda: peer.run(unserved(peer.node)))
            status = await asyncio.to_thread(peer.status)
        except PeerError as error:
            logger.warning("no look at %s: %s", peer.node.spec.name, error)
            return
        self.sightings[peer].look(status, gaps, self._wall_clock())
