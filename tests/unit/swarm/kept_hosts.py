"""Hosts without a model: units, a kept store and a record, joined by byte streams in one process."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import torch

from averaging.config import AveragingConfig
from blocks.adapters import unit_digest
from blocks.spans import Span, UnitId, parse_unit
from blocks.training.ledger import Counted
from blocks.unit_state import UnitState
from peers.network import PeerId
from peers.records import ProgressRecord
from peers.streams.answering import CallServer
from peers.streams.calls import hello_maker
from peers.streams.pool import Pool
from peers.streams.traffic import Traffic
from peers.units.keeping import Copy, told
from peers.units.service import UnitsService
from swarm.units.handing_over import HandingOver
from swarm.units.kept import KeptStore
from swarm.units.safekeeping import Safekeeping
from tests.fakes_network import FakeSwarm

HELLO = hello_maker("run-1", "swarmtune 1")
WHOLE = Span(0, 4)
SHAPES = {UnitId(f"default/block.{block}"): {"a.lora_A": (2, 3), "a.lora_B": (3, 2)} for block in WHOLE.blocks()}


def unit(block: int) -> UnitId:
    return UnitId(f"default/block.{block}")


def trained(block: int, number: int = 3, **changes: object) -> UnitState:
    """A unit after round `number`, with the moments of two steps."""
    tensors = {"a.lora_A": torch.full((2, 3), number + block / 8), "a.lora_B": torch.ones(3, 2)}
    moments = {}
    for name, tensor in tensors.items():
        moments[f"{name}/exp_avg"] = torch.full_like(tensor, 0.01)
        moments[f"{name}/exp_avg_sq"] = torch.full_like(tensor, 0.01)
        moments[f"{name}/step"] = torch.tensor([2.0])
    plain = UnitState(
        unit=unit(block), round=number, weight=4.0, total_samples=9, digest=unit_digest(tensors), tensors=tensors,
        moments=moments,
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]


@dataclass(kw_only=True)
class FakeHost:
    """What keeping asks of a swarm.hosts.host.Host, and the record that tells of it."""

    name: str
    span: Span
    kept: KeptStore
    units: dict[UnitId, UnitState] = field(default_factory=dict)
    round: int = 3
    work: dict[UnitId, Counted] = field(default_factory=dict)
    stayed: list[set[UnitId]] = field(default_factory=list)
    adopted: list[Mapping[UnitId, UnitState]] = field(default_factory=list)
    told_samples: int = 0
    rules: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(run="run-1", shapes=SHAPES))

    async def read_unit(self, wanted: UnitId, *, moments: bool) -> UnitState | None:
        state = self.units.get(wanted)
        return state if state is None or moments else replace(state, moments={})

    def digests(self) -> dict[int, bytes]:
        return {parse_unit(name)[1]: state.digest[:8] for name, state in self.units.items()}

    def counted(self) -> dict[UnitId, Counted]:
        return {name: self.work.get(name, Counted()) for name in self.units}

    def total_samples(self) -> int:
        return max((state.total_samples for state in self.units.values()), default=0)

    async def adopt(self, states: Mapping[UnitId, UnitState], number: int, *, staying: Collection[UnitId] = ()) -> None:
        self.adopted.append(states)
        self.stayed.append(set(staying))
        self.units |= states
        self.round = number

    def record(self) -> ProgressRecord:
        copies = {name: Copy(round=k.version[0], digest=k.version[2]) for name, k in self.kept.units.items()}
        return ProgressRecord(
            run="run-1",
            peer=PeerId(self.name),
            span=self.span,
            round=self.round,
            samples=0,
            total_samples=self.told_samples,
            digests=b"".join(self.digests().get(block, bytes(8)) for block in self.span.blocks()),
            keeps=told(copies, self.span),
            expires_at=1e9,
        )


@dataclass(kw_only=True)
class KeptSwarm:
    """Hosts of one run that see each other's records as they are."""

    network: FakeSwarm
    root: Path
    now: float = 0.0
    hosts: dict[str, FakeHost] = field(default_factory=dict)
    pools: dict[str, Pool] = field(default_factory=dict)
    handing: dict[str, HandingOver] = field(default_factory=dict)
    safe: dict[str, Safekeeping] = field(default_factory=dict)

    async def add(self, name: str, span: Span, *states: UnitState, most_bytes: int = 1 << 20) -> FakeHost:
        kept = KeptStore(self.root / name, run="run-1", layout="layout-1", most_bytes=most_bytes)
        host = FakeHost(name=name, span=span, kept=kept, units={state.unit: state for state in states})
        self.hosts[name] = host

        def others() -> Sequence[ProgressRecord]:
            return [other.record() for other in self.hosts.values() if other is not host]

        safe = self.safe[name] = Safekeeping(
            host,  # type: ignore[arg-type]
            PeerId(name),
            others,
            known=others,
            averaging=AveragingConfig(),
        )
        network = self.network.join(name)
        server = CallServer(HELLO, UnitsService(host, safe, unit_digest), Traffic())
        await network.serve_stream("units", server.serve)
        self.pools[name] = Pool(network, HELLO, Traffic(), {})
        self.handing[name] = HandingOver(host, self.pools[name], others, lambda: self.now)  # type: ignore[arg-type]
        return host

    def lose(self, name: str) -> None:
        """Its process is gone, and its record has expired."""
        self.network.kill(name)
        del self.hosts[name]

    def kept(self, name: str) -> dict[int, tuple[int, float]]:
        """Round and weight of what a host keeps, by block."""
        return {parse_unit(each)[1]: there.version[:2] for each, there in self.hosts[name].kept.units.items()}

    async def close(self) -> None:
        for pool in self.pools.values():
            await pool.close()
