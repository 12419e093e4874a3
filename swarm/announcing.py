"""A host's record in the directory: what it holds and how fast it is, repeated before it expires."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from peers.messages import PROTOCOL_MAX, PROTOCOL_MIN
from peers.records import MAX_ADDRESSES, PeerRecord, seal_record
from swarm.host import Host
from swarm.loading import HostingConfig

if TYPE_CHECKING:
    from swarm.node import Node

RECORD_LIFE_SECONDS = 60.0


class Announcer:
    """Keeps this peer's record in the directory: at once on change, and before it expires."""

    def __init__(self, node: Node, host: Host, config: HostingConfig) -> None:
        self._node, self._host, self._config = node, host, config
        self.sealed = b""
        self.away = ""
        """Why this peer is no host now, one of peers.records.AWAY."""

    async def run(self) -> None:
        """Announce again until cancelled; the first time was before."""
        while True:
            said = self._host.round
            for _ in range(int(RECORD_LIFE_SECONDS / 2)):
                await asyncio.sleep(1.0)
                if self._host.round != said:
                    break
            await self.announce()

    async def announce(self) -> None:
        """Publish the record as of now."""
        host, node = self._host, self._node
        record = PeerRecord(
            run=node.config.run,
            peer=node.network.peer_id,
            span=host.span,
            tokens_per_second=host.tokens_per_second,
            backward_tokens_per_second=host.backward_tokens_per_second,
            queue_seconds=min(600.0, host.thread.backlog() / max(host.tokens_per_second, 1e-3)),
            round=host.round,
            cache_free_bytes=max(0, host.caches.free_bytes),
            addresses=(await node.network.addresses())[:MAX_ADDRESSES],
            protocol=(PROTOCOL_MIN, PROTOCOL_MAX),
            software=node.hello().software,
            dtype=host.config.quantize or str(host.config.dtype).removeprefix("torch."),
            nickname=self._config.nickname,
            # The DHT keeps what expires last, so a goodbye is a newer record without the role, not a shorter one.
            roles=() if self.away else ("host",),
            away=self.away,
            expires_at=node.network.dht_time() + RECORD_LIFE_SECONDS,
        )
        self.sealed = seal_record(node.network.identity, record)
        await node.directory.publish(record)
