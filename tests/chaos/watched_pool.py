"""A peer's pool of streams that lets a test strike at an exact moment of a call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import torch

from peers.network import PeerId
from peers.streams.calls import Answer
from peers.streams.messages import Message
from peers.streams.wire_format import WireFormat
from swarm.peer import Peer

Strike = Callable[[PeerId], None]


class WatchedPool:
    """Passes calls on. At call `number` (from 1) of `kind`, to whomever it goes, two things happen.

    `before` is called with the peer before the call leaves; `sent` once all its bytes are out and no answer is in.
    """

    def __init__(self, peer: Peer, kind: str, number: int, *, before: Strike, sent: Strike) -> None:
        self.struck: PeerId | None = None
        self._peer, self._pool, self._kind, self._left = peer, peer.node.pool, kind, number
        self._before, self._sent = before, sent

    @property
    def me(self) -> PeerId:
        return self._pool.me

    async def call(
        self,
        peer: PeerId,
        kind: str,
        message: Message,
        tensors: Sequence[torch.Tensor] = (),
        *,
        seconds: float,
        wire: WireFormat | None = None,
    ) -> Answer:
        self._left -= message.kind == self._kind
        if self.struck is not None or self._left > 0 or message.kind != self._kind:
            return await self._pool.call(peer, kind, message, tensors, seconds=seconds, wire=wire)
        self.struck = peer
        self._before(peer)
        was_sent = self._bytes(peer)
        running = asyncio.create_task(self._pool.call(peer, kind, message, tensors, seconds=seconds, wire=wire))
        while self._bytes(peer) == was_sent and not running.done():  # noqa: ASYNC110 - no event tells of it
            await asyncio.sleep(0.001)
        self._sent(peer)
        return await running

    def _bytes(self, peer: PeerId) -> int:
        counts = self._peer.node.traffic.by_peer.get(peer, {})
        return counts[self._kind].sent if self._kind in counts else 0


def watch(peer: Peer, kind: str, number: int, *, before: Strike, sent: Strike) -> WatchedPool:
    """Put a watched pool into `peer`; the next trainer or model made there uses it."""
    pool = WatchedPool(peer, kind, number, before=before, sent=sent)
    peer.node.pool = pool  # type: ignore[assignment]
    return pool


def unwatch(peer: Peer) -> None:
    """Put the pool back that was there before."""
    pool = peer.node.pool
    if isinstance(pool, WatchedPool):
        peer.node.pool = pool._pool
