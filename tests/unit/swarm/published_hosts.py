"""Hosts of a tiny model with published adapters on a fake network, and an owner who signs the list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from blocks.adapters import LoraSettings, all_unit_shapes, attach, block_of, unit_digest
from blocks.load import SpanModel, load_span
from blocks.source import ModelSource
from blocks.spans import Span
from blocks.unit_state import UnitState
from blocks.worker import ComputeThread
from peers.network import PeerId
from peers.published.catalogue import Catalogue, Published, open_catalogue, sign_catalogue
from peers.published.service import SharedUnits
from peers.records import PeerRecord
from peers.streams.answering import CallServer
from peers.streams.calls import hello_maker
from peers.streams.pool import Pool
from peers.streams.traffic import Traffic
from swarm.adapters.files import AdapterFiles
from swarm.adapters.publishing import Prepared, prepared_units
from swarm.adapters.watch import CatalogueWatch
from swarm.hosts.memory import AdapterRoom
from swarm.hosts.published import PublishedAdapters, PublishedParts
from swarm.hosts.published_shelf import PublishedShelf, ShelfParts
from swarm.run import RunId
from tests.fakes import fake_peer_id, peer_record
from tests.fakes_network import FakeSwarm
from tests.private_runs import Owner

RUN = RunId("ab" * 16)
HELLO = hello_maker(RUN, "swarmtune 1")
LORA = LoraSettings(seed=1, rank=2)
MUCH = 1 << 40


class Shelves:
    """A DHT in which anybody stores lists of adapters."""

    def __init__(self) -> None:
        self.blobs: list[bytes] = []

    async def store_published(self, run: str, blob: bytes, expires_at: float) -> bool:
        if blob not in self.blobs:
            self.blobs.append(blob)
        return True

    async def find_published(self, run: str) -> list[bytes]:
        return list(self.blobs)


@dataclass
class PublishedHost:
    """One host. `announced` is what its last record said."""

    peer: PeerId
    model: SpanModel
    thread: ComputeThread
    shelf: PublishedShelf
    adapters: PublishedAdapters
    files: AdapterFiles
    pool: Pool
    announced: list[tuple[bytes, ...]] = field(default_factory=list)


@dataclass
class PublishedSwarm:
    """All hosts, the DHT, and the records that everybody sees."""

    network: FakeSwarm
    source: ModelSource
    root: Path
    owner: Owner = field(default_factory=lambda: Owner(run=RUN))
    dht: Shelves = field(default_factory=Shelves)
    records: dict[str, PeerRecord] = field(default_factory=dict)
    hosts: dict[str, PublishedHost] = field(default_factory=dict)
    now: float = 100.0

    def __post_init__(self) -> None:
        self.catalogue = Catalogue(run=RUN)
        self.shapes = all_unit_shapes(LORA, self.source)

    def adapter(self, name: str, *, value: float = 0.5) -> Prepared:
        """A finished adapter in which all numbers are alike."""
        units = {unit: {key: torch.full(s, value) for key, s in named.items()} for unit, named in self.shapes.items()}
        return prepared_units(name, units)

    def sign(self, catalogue: Catalogue) -> bytes:
        """Let the owner's list be this one, and the DHT have it."""
        blob = sign_catalogue(catalogue, self.owner.key)
        self.catalogue = open_catalogue(blob, owner=self.owner.public, run=RUN)
        self.dht.blobs.append(blob)
        return blob

    async def publish(self, *prepared: Prepared, publisher: str = "owner") -> None:
        """Put adapters on the list, and serve the last one from a peer that holds no blocks."""
        for one in prepared:
            self.sign(self.catalogue.with_adapter(one.adapter))
            await self.serve(publisher, one, one.adapter)

    async def serve(self, name: str, source: Prepared, adapter: Published) -> None:
        """A peer that says that it has an adapter, and answers as `source` does."""
        network = self.network.join(fake_peer_id(name))
        await network.serve_stream("units", CallServer(HELLO, SharedUnits(source), Traffic()).serve)
        record = replace(peer_record(fake_peer_id(name), Span(0, 6)), roles=(), adapters=(adapter.mark,))
        self.records[name] = record

    async def add(
        self, name: str, span: Span, *, most_bytes: int | None = None, free: int = MUCH, spare_bytes: int = MUCH
    ) -> PublishedHost:
        """A host, which begins with what is in its state directory and has looked at the list once."""
        peer, state = fake_peer_id(name), self.root / name
        state.mkdir(exist_ok=True)
        model = load_span(self.source, span, dtype=torch.float32, device=torch.device("cpu"))
        attach(model, LORA)
        network, thread = self.network.join(peer), ComputeThread(num_threads=1)
        files = AdapterFiles(state / "published", RUN, "layout", sorted(block_of(unit) for unit in self.shapes))
        shelf = PublishedShelf(ShelfParts(model, thread, LORA.name, files))
        pool = Pool(network, HELLO, Traffic(), {})

        async def announce() -> None:
            host.announced.append(host.adapters.marks())
            self.records[name] = replace(peer_record(peer, span), adapters=host.adapters.marks())

        parts = PublishedParts(
            watch=CatalogueWatch(self.dht, self.owner.public, RUN, state, lambda: 1000.0),
            shelf=shelf,
            files=files,
            span=span,
            shapes=self.shapes,
            adapter=LORA.name,
            room=AdapterRoom(most_bytes, lambda: free),
            spare_bytes=spare_bytes,
            pool=pool,
            records=lambda: list(self.records.values()),
            announce=announce,
        )
        adapters = PublishedAdapters(parts, clock=lambda: self.now)
        host = PublishedHost(peer, model, thread, shelf, adapters, files, pool)
        await network.serve_stream("units", CallServer(HELLO, SharedUnits(shelf), Traffic()).serve)
        await adapters.begin()
        await announce()
        await adapters.follow()
        self.hosts[name] = host
        return host

    async def lose(self, name: str) -> None:
        """A peer is gone, with its record."""
        del self.records[name]
        self.network.kill(fake_peer_id(name))
        if name in self.hosts:
            host = self.hosts.pop(name)
            await host.pool.close()
            host.thread.close()

    async def follow(self, names: Sequence[str] = (), *, times: int = 1) -> None:
        """Let hosts look at the list."""
        for _ in range(times):
            for name in names or list(self.hosts):
                await self.hosts[name].adapters.follow()

    async def close(self) -> None:
        for host in self.hosts.values():
            await host.pool.close()
            host.thread.close()


def lying(prepared: Prepared, block: int, lie: UnitState) -> Prepared:
    """The same adapter from somebody who gives another unit for one block."""
    return replace(prepared, units={**prepared.units, block: lie})


def other_values(state: UnitState, value: float) -> UnitState:
    """A whole unit of other numbers, with a digest that fits these."""
    tensors = {name: torch.full_like(tensor, value) for name, tensor in state.tensors.items()}
    return replace(state, tensors=tensors, digest=unit_digest(tensors))
