"""The transport as the rest sees it: byte streams between peers whose identity is known. No hivemind here."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import NewType, Protocol

PeerId = NewType("PeerId", str)
"""A libp2p peer id in base58: the hash of the peer's public key."""


@dataclass(frozen=True, slots=True)
class ByteStream:
    """One bidirectional stream. `peer` is who is at the other end, by transport identity, never by claim."""

    peer: PeerId
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


StreamHandler = Callable[[ByteStream], Awaitable[None]]


class Network(Protocol):
    """What services and clients need from a running node."""

    @property
    def peer_id(self) -> PeerId:
        """Who this node is."""

    async def open_stream(self, peer: PeerId, kind: str) -> ByteStream:
        """Dial `peer` and open a stream of `kind` (one of messages.StreamKind).

        Raises:
            NetworkFailed: the peer cannot be reached, or does not serve that kind.
        """

    async def serve_stream(self, kind: str, handler: StreamHandler) -> None:
        """Call `handler` with each incoming stream of `kind`; the stream closes when the handler returns."""
