"""Hosts of a tiny model on a fake network, for tests of chains: real services, streams, pools and blocks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import torch

from blocks.adapters import LoraSettings, add_version, attach, drop_version, read_units
from blocks.decoding.cache import SessionCaches
from blocks.load import load_span
from blocks.snapshots import Snapshot, SnapshotShelf
from blocks.source import ModelSource
from blocks.spans import Span
from blocks.worker import ComputeThread, Priority
from peers.chains.decode_service import DecodeParts, DecodeService
from peers.chains.edge import Edge
from peers.errors import NoRoute
from peers.info_service import InfoService
from peers.network import PeerId
from peers.published.catalogue import Published
from peers.routes.paces import Paces
from peers.routes.routing import EVERYBODY, Hop, HostView, RouteRules, pick_fast
from peers.streams.answering import CallServer
from peers.streams.calls import hello_maker
from peers.streams.pool import Pool
from peers.streams.traffic import Traffic
from tests.fakes_network import FakeSwarm, fake_swarm

HELLO = hello_maker("run-1", "swarmtune 1")


class KnownRouter:
    """A Router over fixed hosts; whoever failed is out for good. Earlier hosts are preferred."""

    def __init__(self, hosts: dict[str, Span]) -> None:
        self.hosts, self.out, self.slow = hosts, set[PeerId](), set[PeerId]()
        self.paces = Paces(time.monotonic)

    async def spread(self, span: Span, num_tokens: int) -> tuple[Hop, ...]:
        return await self.fast(span)

    def is_slow(self, hop: Hop) -> bool:
        return hop.peer in self.slow

    async def fast(self, span: Span, avoid: frozenset[PeerId] = frozenset()) -> tuple[Hop, ...]:
        views = [
            HostView(peer=PeerId(peer), span=held, tokens_per_second=100.0 - place)
            for place, (peer, held) in enumerate(self.hosts.items())
        ]
        rules: RouteRules = EVERYBODY
        usable = [view for view in views if view.peer not in self.out | self.slow | avoid]
        if not usable:
            raise NoRoute("nobody is left")
        return pick_fast(usable, span, rules=rules)

    def with_adapter(self, adapter: Published) -> KnownRouter:
        return self

    def failed(self, peer: PeerId, reason: str) -> None:
        self.out.add(peer)

    async def refused(self, hop: Hop, reason: str) -> None:
        self.failed(hop.peer, reason)


@dataclass
class ChainHost:
    """One host: its service, and what its pool has sent."""

    service: DecodeService
    caches: SessionCaches
    pool: Pool
    traffic: Traffic
    thread: ComputeThread


class ChainSwarm:
    """The hosts by name, and a client's pool and traffic."""

    def __init__(self, network: FakeSwarm) -> None:
        self.network = network
        self.hosts: dict[str, ChainHost] = {}
        self.traffic = Traffic()
        self.client = Pool(network.join("client"), HELLO, self.traffic, {})

    async def add(self, name: str, source: ModelSource, span: Span, *, cache_bytes: int) -> None:
        """Start a host with the adapter of round 1."""
        model = load_span(source, span, dtype=torch.float32, device=torch.device("cpu"))
        attach(model, LoraSettings(seed=1, rank=2))
        add_version(model, "s1", read_units(model))
        thread, shelf, traffic = ComputeThread(num_threads=1), SnapshotShelf(keep=2), Traffic()
        shelf.add(Snapshot(label="s1", round=1, digests={block: bytes([1]) * 8 for block in span.blocks()}))
        caches = SessionCaches(model, cache_bytes)

        def drop(gone: list[Snapshot]) -> None:
            for snapshot in gone:
                thread.submit(Priority.STEP, lambda label=snapshot.label: drop_version(model, label))  # type: ignore[misc]

        network = self.network.join(name)
        pool = Pool(network, HELLO, traffic, {})
        parts = DecodeParts(span=span, caches=caches, thread=thread, shelf=shelf, drop_versions=drop)
        service = DecodeService(parts, Edge(hidden_size=64, max_positions=source.max_positions), pool)
        await network.serve_stream("decode", CallServer(HELLO, service, traffic).serve)
        info = InfoService(lambda: b"", traffic)
        await network.serve_stream("info", CallServer(HELLO, info, traffic).serve)
        self.hosts[name] = ChainHost(service=service, caches=caches, pool=pool, traffic=traffic, thread=thread)

    def kill(self, name: str) -> None:
        """Its process is gone."""
        self.network.kill(name)

    def sent_by_client(self, peer: str, kind: str) -> int:
        """Bytes of one kind of question that the client sent to one host."""
        counts = self.traffic.by_peer.get(PeerId(peer), {})
        return counts[kind].sent if kind in counts else 0

    async def close(self) -> None:
        await self.client.close()
        for host in self.hosts.values():
            await host.pool.close()
            host.thread.close()


@contextlib.asynccontextmanager
async def chain_swarm(
    source: ModelSource, hosts: dict[str, Span], *, cache_bytes: int = 8 << 20
) -> AsyncIterator[ChainSwarm]:
    """Hosts by name and span, on a fake network."""
    async with fake_swarm() as network:
        swarm = ChainSwarm(network)
        try:
            for name, span in hosts.items():
                await swarm.add(name, source, span, cache_bytes=cache_bytes)
            yield swarm
        finally:
            await swarm.close()
