"""A swarm of real processes and peers of this one: train through it while a plan of faults strikes it, and compare."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Collection, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from parts.chaos_hosts import ChaosHosts, Layout, until
from parts.faults import FaultPlan
from parts.tiny_model import BACK, FRONT, counting_rows

from blocks.adapters import unit_digest
from blocks.spans import unit_of
from blocks.unit_state import UnitState
from peers.config import NetworkConfig
from peers.errors import PeerLost
from peers.network import PeerId
from peers.records import ProgressRecord
from peers.units.client import Fetching, fetch_unit
from swarm.data.stream import SampleSet
from swarm.join_string import RunDirectory
from swarm.local import LOOPBACK
from swarm.peer import Peer
from swarm.peer_config import PeerConfig
from swarm.training.trainer import Progress

T = TypeVar("T")

SETTLE_SECONDS = 180.0
QUIET_SECONDS = 5.0  # longer than a proposal, its lead and a round on a busy machine
BATCH = 8
SPANS = {"a": FRONT, "b": FRONT, "c": BACK, "d": BACK}
SETTINGS: dict[str, dict[str, object]] = {
    "training": {"batch_size": BATCH, "sequence_length": 32, "learning_rate": 1e-2},
    "rounds": {"round_samples": 4 * BATCH},
    "wire": {"dtype": "fp32"},
    "model": {"compute_dtype": "fp32"},
}


def tiny_layout(root: Path, model: Path, **changes: Any) -> Layout:
    """Two hosts of each half of the tiny model."""
    layout = Layout(model=str(model), spans=SPANS, settings=SETTINGS, cache_home=root / "cache-home")
    return replace(layout, **changes)


@dataclass(kw_only=True)
class Story:
    """What a trainer saw: losses by step, the moments (monotonic seconds) of steps and of faults."""

    losses: list[float] = field(default_factory=list)
    steps_at: list[float] = field(default_factory=list)
    faults_at: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    repeated: int = 0
    tokens: int = 0

    @property
    def falls(self) -> bool:
        """Whether the last quarter's mean loss is clearly below the first's."""
        part = max(1, len(self.losses) // 4)
        return statistics.fmean(self.losses[-part:]) < statistics.fmean(self.losses[:part]) - 0.05

    @property
    def usual_step(self) -> float:
        """The median of seconds between steps."""
        return statistics.median(b - a for a, b in zip(self.steps_at, self.steps_at[1:], strict=False))

    def stalls(self) -> list[float]:
        """Seconds from each fault to the end of the next step."""
        return [min(moment for moment in self.steps_at if moment >= fault) - fault for fault in self.faults_at]


class ChaosSwarm(ChaosHosts):
    """Host processes by name, and peers of this process, to train, to generate or to look."""

    def __init__(self, root: Path, layout: Layout) -> None:
        super().__init__(root, layout)
        self.peers: dict[str, Peer] = {}

    def ensure(self, *, front: int = 2, back: int = 2) -> None:
        """At least so many living holders of each half, all equal: those who are missing start again from their state.

        No more than a test needs, as each start takes seconds of a core.
        """
        self.settled()
        missing: list[str] = []
        for span, wanted in ((FRONT, front), (BACK, back)):
            living = sum(self.hosts[name].host.span.covers(span) for name in self.alive)
            dead = [name for name, own in self.layout.spans.items() if own == span and not self.is_alive(name)]
            missing += dead[: max(0, wanted - living)]
        started = list(missing)
        if missing and self.join is None:
            self.start(missing[0])
            self.wait_ready(missing.pop(0))
        for name in missing:
            self.start(name)
        self.wait_ready(*missing)
        if started:
            self.wait_equal()

    # -- peers of this process

    def enter(self, name: str, **settings: Any) -> Peer:
        """A peer without blocks. It only dials, so that all that it does goes through the hosts' links."""
        if name not in self.peers:
            config = PeerConfig(
                state_root=self.root / "states",
                state=self.root / "states" / name,
                cache_dir=self.layout.cache_home / "swarmtune",
                network=NetworkConfig(host=LOOPBACK, client_mode=True),
                num_threads=1,
                **{"route_seconds": 60.0, **settings},
            )
            self.peers[name] = Peer.enter(self.join or RunDirectory(path=self.run.path, join=None), config)
            self.pids |= {self.peers[name].node.network.p2p.pid}
        return self.peers[name]

    def leave(self, name: str) -> None:
        self.peers.pop(name).close()

    @property
    def eye(self) -> Peer:
        """A peer that looks on."""
        return self.enter("eye")

    def train(
        self,
        peer: Peer,
        steps: int,
        plan: FaultPlan | None = None,
        story: Story | None = None,
        *,
        data: SampleSet | None = None,
        held_out: SampleSet | None = None,
    ) -> Story:
        """Train for `steps`, with the plan's faults after its steps (counted from 1)."""
        story = story or Story()
        done = 0

        def on_progress(progress: Progress) -> None:
            nonlocal done
            done += 1
            story.steps_at.append(time.monotonic())
            for fault in plan.due(done - 1, done) if plan else ():
                self.strike(fault)
                story.faults_at.append(time.monotonic())

        result = peer.train(data or counting_rows(64), steps=steps, held_out=held_out, on_progress=on_progress)
        story.losses += result.losses
        story.repeated += result.repeated
        story.tokens += result.tokens
        story.held_out += [evaluation.loss for evaluation in result.evaluations]
        return story

    def train_to_round(self, peer: Peer, number: int, story: Story | None = None) -> Story:
        """Train until every living host has done round `number`."""
        story = story or Story()
        deadline = time.monotonic() + SETTLE_SECONDS
        while min(record.round for record in self.records().values()) < number:
            assert time.monotonic() < deadline, f"round {number} did not come: {self.describe()}"
            self.train(peer, 2, story=story)
        return story

    # -- what is known of the hosts

    def records(self) -> dict[str, ProgressRecord]:
        """The newest progress records of the living, by name; waits until all have told theirs."""
        found: dict[str, ProgressRecord] = {}

        def all_told() -> bool:
            node = self.eye.node
            records = run_in(self.eye, node.directory.find_progress(node.config.run, node.whole))
            found.clear()
            found.update({name: r for r in records for name in self.alive if self.ids.get(name) == r.peer})
            return len(found) == len(self.alive)

        until(all_told, "a progress record of every living host", seconds=SETTLE_SECONDS)
        return found

    @property
    def newest_round(self) -> int:
        return max(record.round for record in self.records().values())

    def units(self, name: str) -> dict[int, UnitState]:
        """All units of a host, fetched from it."""
        span = self.records()[name].span

        async def fetch() -> dict[int, UnitState]:
            fetching = Fetching(digest=unit_digest, seconds=20.0)
            states = [
                fetch_unit(self.eye.node.pool, self.ids[name], unit_of("default", block), fetching)
                for block in span.blocks()
            ]
            return {int(state.unit.rpartition(".")[2]): state for state in await asyncio.gather(*states)}

        return run_in(self.eye, fetch())

    def digests(self) -> dict[int, dict[str, bytes]]:
        """By block, the digest at every living holder."""
        names = self.alive
        with ThreadPoolExecutor(4) as pool:
            found = dict(zip(names, pool.map(self.units, names), strict=True))
        return {
            block: {name: units[block].digest for name, units in found.items() if block in units}
            for block in range(self.layout.num_blocks)
        }

    def wait_equal(self) -> int:
        """Until all living hosts stand at one round with equal bits in every block; returns the round."""
        rounds: set[int] = set()

        def equal() -> bool:
            rounds.clear()
            rounds.update(record.round for record in self.records().values())
            return len(rounds) == 1 and self.is_equal()

        until(equal, "equal bits at all holders", seconds=SETTLE_SECONDS)
        return rounds.pop()

    def is_equal(self) -> bool:
        """Whether all living holders of each unit have the same bits now."""
        try:
            return all(len(set(found.values())) == 1 for found in self.digests().values())
        except PeerLost:  # libp2p does not dial again at once where it could not a moment ago
            return False

    def wait_averaged(self) -> int:
        """Until every sample that living hosts have seen is in a round that all of them have done; returns it.

        Only where the run's rounds begin after some seconds too, however few samples are in.
        """
        return wait_averaged(self.eye, {self.ids[name] for name in self.alive})

    def rest(self) -> int:
        """Until no round is due or under way, so that what is served does not change; returns the round."""
        seen: dict[str, tuple[int, int]] = {}
        since = time.monotonic()

        def quiet() -> bool:
            nonlocal seen, since
            now = {name: (record.round, record.samples) for name, record in self.records().items()}
            if now != seen:
                seen, since = now, time.monotonic()
            return time.monotonic() - since > QUIET_SECONDS

        until(quiet, "no change at any host", seconds=SETTLE_SECONDS)
        return self.wait_equal()

    def counted(self, block: int) -> int:
        """Samples counted for one block: what rounds have averaged, and what its holders have seen since."""
        holders = {name: r for name, r in self.records().items() if block in r.span}
        averaged = max(self.units(name)[block].total_samples for name in holders)
        return averaged + sum(record.samples for record in holders.values())

    def describe(self) -> str:
        told = {name: (record.round, record.samples) for name, record in self.records().items()}
        return f"round and samples by host {told}; " + "; ".join(self.hosts[name].tail() for name in told)

    def close(self) -> None:
        """Leave with every peer of this process, and end every process."""
        for name in list(self.peers):
            self.leave(name)
        super().close()


def wait_averaged(peer: Peer, hosts: Collection[PeerId]) -> int:
    """See ChaosSwarm; `hosts` are the living ones, and `peer` is any that can read their records."""
    rounds: set[int] = set()

    def all_done() -> bool:
        records = run_in(peer, peer.node.directory.find_progress(peer.node.config.run, peer.node.whole))
        told = {record.peer: record for record in records if record.peer in hosts}
        rounds.clear()
        rounds.update(record.round for record in told.values())
        return len(told) == len(hosts) and len(rounds) == 1 and not any(record.samples for record in told.values())

    until(all_done, "a round with all samples at every living host", seconds=SETTLE_SECONDS)
    return rounds.pop()


def run_in(peer: Peer, work: Coroutine[object, object, T]) -> T:
    """Run a coroutine on a peer's own loop."""
    return peer.loop.run(work)
