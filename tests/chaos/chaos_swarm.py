"""A swarm of real processes on a tiny model, and what a test does to it: kill, freeze, start again, compare."""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from blocks.adapters import unit_digest
from blocks.spans import Span, unit_of
from blocks.unit_state import UnitState
from peers.config import NetworkConfig
from peers.network import PeerId
from peers.records import ProgressRecord
from peers.unit_client import Fetching, fetch_unit
from swarm.api import init
from swarm.data import SampleSet
from swarm.join_string import Join, RunDirectory
from swarm.local import LOOPBACK, HostProcess, LocalHost
from swarm.peer import Peer, PeerConfig
from swarm.train import Progress
from tests.chaos.faults import Fault, FaultKind, FaultPlan
from tests.integration.swarm.small_swarm import BACK, FRONT, NUM_BLOCKS, WHOLE, until

T = TypeVar("T")

START_SECONDS = 240.0  # generous: a start is ten seconds of a core, which others may be using
SETTLE_SECONDS = 90.0
QUIET_SECONDS = 5.0  # longer than a proposal, its lead and a round on a busy machine
BATCH = 8
SPANS = {"a": FRONT, "b": FRONT, "c": BACK, "d": BACK}
SETTINGS: dict[str, dict[str, object]] = {
    "training": {"batch_size": BATCH, "sequence_length": 32, "learning_rate": 1e-2},
    "rounds": {"round_samples": 4 * BATCH},
    "wire": {"dtype": "fp32"},
    "model": {"compute_dtype": "fp32"},
}


def counting_rows(count: int, *, length: int = 24) -> SampleSet:
    """Rows that count upwards from different words: soon learnt, so that the loss falls within a few steps."""
    starts = np.arange(count) * 7 % 100
    ids = (3 + (starts[:, None] + np.arange(length)) % 100).astype(np.int32).ravel()
    offsets = np.arange(count + 1, dtype=np.int64) * length
    return SampleSet(ids=ids, labels=ids.copy(), offsets=offsets, fingerprint=f"counting-{count}")


@dataclass(kw_only=True)
class Story:
    """What a trainer saw: losses by step, the moments (monotonic seconds) of steps and of faults."""

    losses: list[float] = field(default_factory=list)
    steps_at: list[float] = field(default_factory=list)
    faults_at: list[float] = field(default_factory=list)
    repeated: int = 0

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


class ChaosSwarm:
    """Host processes by name, and peers of the test's own process. Every process ever started is in `pids`."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root = root
        self.run = init(root / "run", str(model), cache_dir=root / "cache", **SETTINGS)
        self.hosts: dict[str, HostProcess] = {}
        self.ids: dict[str, PeerId] = {}
        self.peers: dict[str, Peer] = {}
        self.pids: set[int] = set()
        self._starting: set[str] = set()

    # -- processes

    def start(self, name: str, span: Span, *, program: tuple[str, ...] = ()) -> HostProcess:
        """Start a host, or start it again from its state; does not wait until it is ready."""
        join = self.join
        host = LocalHost(
            target=self.run.path if join is None else join,
            span=span,
            state=self.root / "states" / name,
            cache_home=self.root / "cache-home",
            **({"program": program} if program else {}),  # type: ignore[arg-type]
        )
        self.hosts[name] = process = HostProcess(host)
        self.pids.add(process.pid)
        self._starting.add(name)
        return process

    def wait_ready(self, *names: str) -> None:
        """Until they serve their blocks."""
        for name in names:
            host = self.hosts[name]
            host.wait_ready(seconds=START_SECONDS)
            self.ids[name] = PeerId(host.join.peers[0].rpartition("/p2p/")[2])
            self.pids |= _children(host.pid)
            self._starting.discard(name)

    def ensure(self, *, front: int = 2, back: int = 2) -> None:
        """At least so many living holders of each half, all equal: those who are missing start again from their state.

        No more than a test needs, as each start takes seconds of a core.
        """
        self.wait_ready(*(name for name in self.alive if name in self._starting))
        missing: list[str] = []
        for span, wanted in ((FRONT, front), (BACK, back)):
            living = sum(self.hosts[name].host.span.covers(span) for name in self.alive)
            dead = [name for name, own in SPANS.items() if own == span and not self.is_alive(name)]
            missing += dead[: max(0, wanted - living)]
        started = list(missing)
        if missing and self.join is None:
            self.start(missing[0], SPANS[missing[0]])
            self.wait_ready(missing.pop(0))
        for name in missing:
            self.start(name, SPANS[name])
        self.wait_ready(*missing)
        if started:
            self.wait_equal()

    def is_alive(self, name: str) -> bool:
        return name in self.hosts and self.hosts[name].process.poll() is None

    @property
    def alive(self) -> list[str]:
        return [name for name in self.hosts if self.is_alive(name)]

    @property
    def join(self) -> Join | None:
        """Through a peer of this process, or a living host that is ready; None where the run has nobody."""
        for peer in self.peers.values():
            return peer.join
        ready = [name for name in self.alive if name not in self._starting]
        return self.hosts[ready[0]].join if ready else None

    def name_of(self, peer: PeerId) -> str:
        return next(name for name, found in self.ids.items() if found == peer)

    def family(self, name: str) -> set[int]:
        """A host's process and those that it started."""
        return {self.hosts[name].pid, *_children(self.hosts[name].pid)}

    def kill(self, name: str) -> None:
        self.hosts[name].kill()

    def freeze(self, name: str) -> None:
        os.kill(self.hosts[name].pid, signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        os.kill(self.hosts[name].pid, signal.SIGCONT)

    def strike(self, fault: Fault) -> None:
        match fault.kind:
            case FaultKind.KILL:
                self.kill(fault.name)
            case FaultKind.FREEZE:
                self.freeze(fault.name)
            case FaultKind.THAW:
                self.thaw(fault.name)
            case FaultKind.RESTART:
                self.start(fault.name, self.hosts[fault.name].host.span)

    def command(self, *arguments: str, program: tuple[str, ...] = ("-m", "swarm.cli.main")) -> subprocess.Popen[bytes]:
        """Another `swarm …` process; its output goes to a file."""
        log = (self.root / f"command-{len(self.pids)}.txt").open("ab")
        environment = os.environ | {"XDG_CACHE_HOME": str(self.root / "cache-home"), "OMP_NUM_THREADS": "1"}
        with log:
            process = subprocess.Popen([sys.executable, *program, *arguments], stdout=log, stderr=log, env=environment)
        self.pids.add(process.pid)
        return process

    # -- peers of this process

    def enter(self, name: str, **settings: Any) -> Peer:
        """A peer without blocks, to train, to generate or to look."""
        if name not in self.peers:
            config = PeerConfig(
                state_root=self.root / "states",
                state=self.root / "states" / name,
                cache_dir=self.root / "cache",
                network=NetworkConfig(host=LOOPBACK),
                num_threads=1,
                route_seconds=60.0,
                **settings,
            )
            join = self.join
            self.peers[name] = Peer.enter(join or RunDirectory(path=self.run.path, join=None), config)
            self.pids |= {self.peers[name].node.network.p2p.pid}
        return self.peers[name]

    def leave(self, name: str) -> None:
        self.peers.pop(name).close()

    @property
    def eye(self) -> Peer:
        """A peer that looks on."""
        return self.enter("eye")

    def train(self, peer: Peer, steps: int, plan: FaultPlan | None = None, story: Story | None = None) -> Story:
        """Train for `steps`, with the plan's faults after its steps (counted from 1)."""
        story = story or Story()
        done = 0

        def on_progress(progress: Progress) -> None:
            nonlocal done
            done += 1
            story.steps_at.append(time.monotonic())
            for fault in plan.due(done) if plan else ():
                self.strike(fault)
                story.faults_at.append(time.monotonic())

        result = peer.train(counting_rows(64), steps=steps, on_progress=on_progress)
        story.losses += result.losses
        story.repeated += result.repeated
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
            records = run_in(self.eye, node.directory.find_progress(node.config.run, WHOLE))
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

        async def fetch() -> dict[int, UnitState]:
            fetching = Fetching(digest=unit_digest, seconds=20.0)
            states = [
                fetch_unit(self.eye.node.pool, self.ids[name], unit_of("default", block), fetching)
                for block in self.hosts[name].host.span.blocks()
            ]
            return {int(state.unit.rpartition(".")[2]): state for state in await asyncio.gather(*states)}

        return run_in(self.eye, fetch())

    def digests(self) -> dict[int, dict[str, bytes]]:
        """By block, the digest at every living holder."""
        with ThreadPoolExecutor(4) as pool:
            found = dict(zip(self.alive, pool.map(self.units, self.alive), strict=True))
        return {
            block: {name: units[block].digest for name, units in found.items() if block in units}
            for block in range(NUM_BLOCKS)
        }

    def wait_equal(self) -> int:
        """Until all living hosts stand at one round with equal bits in every block; returns the round."""
        rounds: set[int] = set()

        def equal() -> bool:
            rounds.clear()
            rounds.update(record.round for record in self.records().values())
            return len(rounds) == 1 and all(len(set(found.values())) == 1 for found in self.digests().values())

        until(equal, "equal bits at all holders", seconds=SETTLE_SECONDS)
        return rounds.pop()

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
        """End everything that was started here."""
        for name in list(self.peers):
            self.leave(name)
        for process in self.hosts.values():
            if process.process.poll() is None:
                process.process.send_signal(signal.SIGCONT)
                process.kill()


def run_in(peer: Peer, work: Coroutine[object, object, T]) -> T:
    """Run a coroutine on a peer's own loop."""
    return peer._loop.run(work)


def is_running(pid: int) -> bool:
    """Whether a process is there and has not ended (a zombie has)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def _children(pid: int) -> set[int]:
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        found |= {int(child) for child in (task / "children").read_text().split()}
    return found
