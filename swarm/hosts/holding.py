"""What one node holds over time: a span, and another one when it moves. Made by `Node.host`."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from blocks.errors import BlockError
from blocks.spans import Span
from peers.errors import PeerError
from peers.routes.router import is_there
from swarm.errors import SwarmError
from swarm.hosts.announcing import Announcer, Place
from swarm.hosts.contributions import Contributions
from swarm.hosts.healing import Healer, HealerConfig
from swarm.hosts.hosting import Hosting, start_hosting
from swarm.hosts.loading import HostingConfig, choose
from swarm.hosts.memory_now import taken_bytes
from swarm.hosts.pausing import LEAVING, TO_A_GAP

if TYPE_CHECKING:
    from swarm.node import Node

logger = logging.getLogger(__name__)

_THERE_SECONDS = 3.0


class Holding:
    """One node's blocks; implements healing.Mover."""

    announcer: Announcer

    def __init__(self, node: Node, config: HostingConfig) -> None:
        self.hosting: Hosting | None = None
        self._node, self._config = node, config
        self._taken_bytes = taken_bytes()  # now, as a span that was held would count twice when another takes its place
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def is_away(self) -> bool:
        """See Mover."""
        return self.hosting is None or bool(self.announcer.away)

    async def begin(self) -> Hosting:
        """See Node.host."""
        node, config = self._node, self._config
        chosen = await choose(node, config, taken_bytes=self._taken_bytes)
        place = Place(
            span=chosen.span,
            capacity=chosen.capacity,
            pinned=config.span is not None,
            since=node.network.dht_time(),
        )
        given = await asyncio.to_thread(Contributions, node.config.state, node.network.peer_id)
        self.announcer = Announcer(node, place, given, nickname=config.nickname)
        await self.announcer.announce()  # so that who comes at the same moment chooses other blocks
        announcing = node.spawn(self.announcer.run(), "announcements")
        try:
            self.hosting, self._tasks = await start_hosting(node, chosen, config, self.announcer)
        except BaseException:
            await node.end([announcing])  # nobody may wait for blocks that are not coming
            raise
        if not place.pinned:
            of_this = HealerConfig(me=node.network.peer_id, num_blocks=len(node.whole))
            healer = Healer(
                self,
                node.router,
                node.network.dht_time,
                of_this,
                is_there=partial(is_there, node.pool, seconds=_THERE_SECONDS),
            )
            node.spawn(healer.run(), "placement")
        logger.info("holding blocks=%s", chosen.span)
        return self.hosting

    async def promise(self, span: Span | None) -> None:
        """See Mover."""
        await self.announcer.promise(span)

    async def move(self, span: Span, *, to_a_gap: bool = False) -> bool:
        """See Mover. Work that is in flight and can end is finished first; new work goes to the other holders."""
        hosting = self.hosting
        if hosting is None:
            return False
        before = hosting.host.span
        await hosting.leave("moving", TO_A_GAP if to_a_gap else LEAVING)
        self.hosting = None
        await self._node.end(self._tasks)
        await hosting.stop()
        await self.announcer.gone()
        try:
            await self._hold(span)
        except (BlockError, SwarmError, PeerError, MemoryError) as error:
            logger.error("blocks %s cannot be held: %s; going back to %s", span, error, before)
            await self.announcer.promise(before)
            await self._hold(before)
            return False
        logger.info("moved blocks=%s before=%s", span, before)
        return True

    async def _hold(self, span: Span) -> None:
        config = replace(self._config, span=span)
        chosen = await choose(self._node, config, taken_bytes=self._taken_bytes)
        self.hosting, self._tasks = await start_hosting(self._node, chosen, config, self.announcer)
