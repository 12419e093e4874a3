"""Byte streams between named peers over socket pairs: as real as p2pd's to whoever reads and writes, and far faster."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence

import torch

from peers.errors import NetworkFailed, PeerLost
from peers.network import ByteStream, PeerId, StreamHandler
from peers.streams.calls import Answer
from peers.streams.messages import Message
from peers.streams.wire_format import WireFormat


class FakeSwarm:
    """All peers of one test. Leave its context to end every stream and handler."""

    def __init__(self) -> None:
        self._networks: dict[PeerId, FakeNetwork] = {}

    def join(self, peer: str) -> FakeNetwork:
        """A network for a peer of this name."""
        network = self._networks[PeerId(peer)] = FakeNetwork(self, PeerId(peer))
        return network

    def kill(self, peer: str) -> None:
        """Its process is gone: its streams end, its handlers stop, and it cannot be dialled."""
        self._networks.pop(PeerId(peer)).end()

    def find(self, peer: PeerId) -> FakeNetwork:
        if peer not in self._networks:
            raise NetworkFailed(f"peer {peer} cannot be reached")
        return self._networks[peer]

    async def stop(self) -> None:
        handlers = [task for network in self._networks.values() for task in network.handlers]
        for peer in list(self._networks):
            self.kill(peer)
        await asyncio.gather(*handlers, return_exceptions=True)


class FakeNetwork:
    """One peer's `peers.network.Network`."""

    def __init__(self, swarm: FakeSwarm, peer: PeerId) -> None:
        self._swarm, self._peer = swarm, peer
        self._served: dict[str, StreamHandler] = {}
        self._writers: list[asyncio.StreamWriter] = []
        self._stalled = False
        self.handlers: set[asyncio.Task[None]] = set()
        self.failures: list[BaseException] = []
        """What escaped from handlers: a test that expects none asserts so."""

    @property
    def peer_id(self) -> PeerId:
        return self._peer

    async def open_stream(self, peer: PeerId, kind: str) -> ByteStream:
        there = self._swarm.find(peer)
        if kind not in there._served:
            raise NetworkFailed(f"peer {peer} does not serve '{kind}'")
        ours, theirs = socket.socketpair()
        stream = await self._wrap(ours, peer)
        incoming = await there._wrap(theirs, self._peer)
        task = asyncio.create_task(there._handle(there._served[kind], incoming))
        there.handlers.add(task)
        return stream

    async def serve_stream(self, kind: str, handler: StreamHandler) -> None:
        self._served[kind] = handler

    def stall(self) -> None:
        """From now on this peer reads nothing, like a suspended laptop."""
        self._stalled = True
        for writer in self._writers:
            if not writer.is_closing():
                writer.transport.pause_reading()  # type: ignore[attr-defined]  # a socket's transport has it

    def end(self) -> None:
        for task in self.handlers:
            task.cancel()
        for writer in self._writers:
            writer.transport.abort()

    async def _wrap(self, sock: socket.socket, peer: PeerId) -> ByteStream:
        reader, writer = await asyncio.open_unix_connection(sock=sock)
        self._writers.append(writer)
        if self._stalled:
            writer.transport.pause_reading()  # type: ignore[attr-defined]
        return ByteStream(peer=peer, reader=reader, writer=writer)

    async def _handle(self, handler: StreamHandler, stream: ByteStream) -> None:
        try:
            await handler(stream)
        except Exception as error:
            self.failures.append(error)
        finally:
            stream.writer.close()


class Nobody:
    """The pool of a peer that reaches no other."""

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
        raise PeerLost(f"peer {peer} cannot be reached")


@contextlib.asynccontextmanager
async def fake_swarm() -> AsyncIterator[FakeSwarm]:
    swarm = FakeSwarm()
    try:
        yield swarm
    finally:
        await swarm.stop()
