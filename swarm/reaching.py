"""How a peer behind NAT stays in reach of the others: it keeps a connection to each that it can dial.

Streams run both ways over a connection, whoever made it; so they ask it, and send gradients back to it, over these.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from blocks.spans import Span
from peers.errors import NetworkFailed
from peers.network import PeerId
from peers.records import PeerRecord
from swarm.errors import BadConfig

logger = logging.getLogger(__name__)

MOST_CONNECTIONS = 64
_LOOK_SECONDS = 2.0
_AGAIN_SECONDS = 15.0  # after a peer that did not answer


class Dialler(Protocol):
    """What it needs of `peers.hivemind_network.HivemindNetwork`."""

    @property
    def peer_id(self) -> PeerId:
        """Who this node is."""

    async def connected(self) -> frozenset[PeerId]:
        """To whom there is a connection now."""

    async def connect(self, peer: PeerId, addresses: tuple[str, ...]) -> None:
        """Make one. Raises NetworkFailed."""


class Reaching:
    """Start `run()` in a task group. `records` are those of the router's last look, `span` is what this peer holds."""

    def __init__(
        self,
        network: Dialler,
        records: Callable[[], Sequence[PeerRecord]],
        span: Span,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._network, self._records, self._span, self._clock = network, records, span, clock
        self._again_at: dict[PeerId, float] = {}

    async def run(self) -> None:
        """Look every two seconds, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(_LOOK_SECONDS)

    async def look(self) -> None:
        """Dial whoever is not connected.

        Raises:
            NetworkFailed: p2pd is gone.
        """
        now = self._clock()
        self._again_at = {peer: at for peer, at in self._again_at.items() if at > now}
        out = (await self._network.connected()) | self._again_at.keys() | {self._network.peer_id}
        async with asyncio.TaskGroup() as tasks:
            for record in to_dial(self._records(), self._span, out):
                tasks.create_task(self._dial(record))

    async def _dial(self, record: PeerRecord) -> None:
        try:
            await self._network.connect(record.peer, record.addresses)
        except NetworkFailed as error:
            self._again_at[record.peer] = self._clock() + _AGAIN_SECONDS
            logger.info("no connection peer=%s reason=%s", record.peer, error)


async def start_reaching(network: Dialler, records: Callable[[], Sequence[PeerRecord]], span: Span | None) -> Reaching:
    """Connect to all that can be dialled, before this peer holds `span`; the caller runs what is returned.

    Raises:
        BadConfig: nobody has said what this peer, which is of use to itself alone, shall hold.
        NetworkFailed: p2pd is gone.
    """
    if span is None:
        raise BadConfig(
            "nobody can dial this peer, so that it serves itself alone; say by --blocks START:END what it shall hold"
        )
    reaching = Reaching(network, records, span)
    await reaching.look()
    return reaching


def to_dial(records: Sequence[PeerRecord], span: Span, out: Collection[PeerId]) -> list[PeerRecord]:
    """Of the peers that can be dialled the first MOST_CONNECTIONS, who share blocks of `span` before others, without
    those that are `out`.
    """

    def rank(record: PeerRecord) -> tuple[bool, PeerId]:
        return not (record.span.start < span.end and span.start < record.span.end), record.peer

    wanted = sorted((record for record in records if record.addresses), key=rank)[:MOST_CONNECTIONS]
    return [record for record in wanted if record.peer not in out]
