"""Host processes of one run, each behind a link of its own, and what a plan of faults does to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from parts.clocked_host import set_clock
from parts.faults import STARTS_AGAIN, Fault, FaultKind
from parts.harm import CLOCK_SECONDS, SLOW_LINK, Garbage, Later, allow_growth, forbid_growth
from parts.swarms import NO_LINK, LinkProcess, free_port

from blocks.spans import Span
from peers.network import PeerId
from swarm.api import init
from swarm.join_string import MAX_BOOTSTRAP, Join
from swarm.local import LOOPBACK, HostProcess, LocalHost

START_SECONDS = 240.0  # generous: a start is ten seconds of a core, which others may be using
_END_SECONDS = 30.0
_CLOCKED = str(Path(__file__).with_name("clocked_host.py"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What a swarm of processes is made of: the model (a name or a path), hosts by name, settings of swarm.toml.

    `cache_home` is where converted models are; `extra` are options of `swarm join` for every host.
    """

    model: str
    spans: Mapping[str, Span]
    settings: Mapping[str, Mapping[str, object]]
    cache_home: Path
    extra: tuple[str, ...] = ()

    @property
    def num_blocks(self) -> int:
        """Of the model."""
        return max(span.end for span in self.spans.values())

    def groups(self) -> dict[str, list[str]]:
        """Names of hosts by the blocks that they hold."""
        found: dict[str, list[str]] = {}
        for name, span in self.spans.items():
            found.setdefault(str(span), []).append(name)
        return found


@dataclass
class _Place:
    """Where a host lives: its own port, that of its link, and the file that moves its clock."""

    port: int
    front: int
    clock: Path


@dataclass
class ChaosHosts:
    """Host processes by name. Every process ever started is in `pids`. `close` ends them all."""

    root: Path
    layout: Layout
    hosts: dict[str, HostProcess] = field(default_factory=dict)
    ids: dict[str, PeerId] = field(default_factory=dict)
    pids: set[int] = field(default_factory=set)
    later: Later = field(default_factory=Later)

    def __post_init__(self) -> None:
        settings = dict(self.layout.settings)
        cache = self.layout.cache_home / "swarmtune"
        self.run = init(self.root / "run", self.layout.model, cache_dir=cache, **settings)
        self.links = LinkProcess()
        self.pids.add(self.links.pid)
        self._starting: set[str] = set()
        self._places: dict[str, _Place] = {}
        self._garbage: dict[str, Garbage] = {}
        self._lock = threading.RLock()  # faults are undone in threads of their own

    # -- processes

    def start(self, name: str, span: Span | None = None, *, program: tuple[str, ...] = ()) -> HostProcess:
        """Start a host, or start it again from its state; does not wait until it is ready."""
        with self._lock:
            self._starting.add(name)
            join, place = self.join, self._place(name)
            set_clock(place.clock, 0.0)
            announce = f"/ip4/{LOOPBACK}/tcp/{place.front}"
            host = LocalHost(
                target=self.run.path if join is None else join,
                span=span or self.layout.spans[name],
                state=self.root / "states" / name,
                cache_home=self.layout.cache_home,
                extra=("--port", str(place.port), "--announce", announce, *self.layout.extra),
                program=program or (_CLOCKED, str(place.clock)),
            )
            self.hosts[name] = process = HostProcess(host)
            self.pids.add(process.pid)
            return process

    def wait_ready(self, *names: str) -> None:
        """Until they serve their blocks."""
        for name in names:
            host = self.hosts[name]
            host.wait_ready(seconds=START_SECONDS)
            self.ids[name] = PeerId(host.join.peers[0].rpartition("/p2p/")[2])
            self.pids |= self.family(name)
            self._starting.discard(name)

    def start_all(self) -> None:
        """Every host of the layout: the first one alone, then the others through it."""
        first, *others = self.layout.spans
        self.start(first)
        self.wait_ready(first)
        for name in others:
            self.start(name)
        self.wait_ready(*others)

    def wait_started(self) -> None:
        """Until every living host is ready."""
        self.wait_ready(*(name for name in self.alive if name in self._starting))

    def is_alive(self, name: str) -> bool:
        return name in self.hosts and self.hosts[name].process.poll() is None

    def is_ready(self, name: str) -> bool:
        """Whether it lives and serves its blocks, as far as is known here."""
        return self.is_alive(name) and name not in self._starting

    @property
    def alive(self) -> list[str]:
        return [name for name in self.hosts if self.is_alive(name)]

    @property
    def join(self) -> Join | None:
        """Through all living hosts that are ready; None where there are none."""
        joins = [self.hosts[name].join for name in self.hosts if self.is_ready(name)]
        if not joins:
            return None
        addresses = tuple(dict.fromkeys(join.peers[0] for join in joins))
        return Join(run_id=joins[0].run_id, run_name=joins[0].run_name, peers=addresses[:MAX_BOOTSTRAP])

    def name_of(self, peer: PeerId) -> str:
        return next(name for name, found in self.ids.items() if found == peer)

    def family(self, name: str) -> set[int]:
        """A host's process and those that it started."""
        return {self.hosts[name].pid, *children_of(self.hosts[name].pid)}

    def kill(self, name: str) -> None:
        """`kill -9`; returns when its p2pd has ended too, and so its port is free."""
        family = self.family(name)
        self.hosts[name].kill()
        until(lambda: not any(map(is_running, family)), f"the end of {name} and its p2pd", seconds=_END_SECONDS)

    def freeze(self, name: str) -> None:
        self.hosts[name].process.send_signal(signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        self.hosts[name].process.send_signal(signal.SIGCONT)

    def command(self, *arguments: str, program: tuple[str, ...] = ("-m", "swarm.cli.main")) -> subprocess.Popen[bytes]:
        """Another `swarm …` process; its output goes to a file."""
        log = (self.root / f"command-{len(self.pids)}.txt").open("ab")
        environment = os.environ | {"XDG_CACHE_HOME": str(self.layout.cache_home), "OMP_NUM_THREADS": "1"}
        with log:
            process = subprocess.Popen([sys.executable, *program, *arguments], stdout=log, stderr=log, env=environment)
        self.pids.add(process.pid)
        return process

    # -- faults

    def strike(self, fault: Fault) -> None:
        """Do it now, and see that it is undone after its seconds; `settled` waits for that."""
        with self._lock:
            if self.is_alive(fault.name):
                self._begin(fault)
        if fault.seconds is not None:
            self.later.add(fault.seconds, lambda: self.undo(fault))

    def undo(self, fault: Fault) -> None:
        """End a fault: what was killed starts again and is ready when this returns, what was held up goes on."""
        if fault.kind is FaultKind.RESTART:
            self.hosts[fault.name].stop()  # it was asked already; here it is waited for
        with self._lock:
            self._end(fault)
        if fault.kind in STARTS_AGAIN:
            self.wait_ready(fault.name)

    def settled(self) -> None:
        """Until every fault is undone and every host that was started again is ready."""
        self.later.join()
        self.wait_started()

    def port_of(self, name: str) -> int:
        """Where the host itself listens, behind its link."""
        return self._places[name].port

    def close(self) -> None:
        """End everything that was started here."""
        self.later.cancel()
        for garbage in self._garbage.values():
            garbage.stop()
        for process in self.hosts.values():
            if process.process.poll() is None:
                process.process.send_signal(signal.SIGCONT)
                process.kill()
        self.links.close()

    def _begin(self, fault: Fault) -> None:
        name, pid = fault.name, self.hosts[fault.name].pid
        match fault.kind:
            case FaultKind.KILL:
                self.kill(name)
            case FaultKind.RESTART:
                self._starting.add(name)  # it lives on while it leaves, and is not ready again before it has come back
                self.hosts[name].process.terminate()
            case FaultKind.STOP:
                self.freeze(name)
            case FaultKind.PARTITION:
                family = self.family(name)
                for other, place in self._places.items():
                    self.links.bar(place.front, family, others=other == name)
            case FaultKind.SLOW:
                self.links.set(self._places[name].front, SLOW_LINK)
            case FaultKind.DISK:
                forbid_growth(pid)
            case FaultKind.CLOCK:
                set_clock(self._places[name].clock, CLOCK_SECONDS)
            case FaultKind.GARBAGE:
                self._garbage[name] = Garbage(self._places[name].port, seed=round(fault.at))

    def _end(self, fault: Fault) -> None:
        name = fault.name
        match fault.kind:
            case FaultKind.KILL | FaultKind.RESTART:
                self.start(name, self.hosts[name].host.span)
            case FaultKind.STOP:
                self.thaw(name)
            case FaultKind.PARTITION:
                for place in self._places.values():
                    self.links.unbar(place.front)
            case FaultKind.SLOW:
                self.links.set(self._places[name].front, NO_LINK)
            case FaultKind.DISK:
                allow_growth(self.hosts[name].pid)
            case FaultKind.CLOCK:
                set_clock(self._places[name].clock, 0.0)
            case FaultKind.GARBAGE:
                self._garbage.pop(name).stop()

    def _place(self, name: str) -> _Place:
        if name not in self._places:
            port = free_port()
            clock = self.root / "clocks" / name
            self._places[name] = _Place(port=port, front=self.links.open(port), clock=clock)
        return self._places[name]


def until(happened: Callable[[], bool], what: str, *, seconds: float) -> None:
    """Wait for something that another process brings about.

    Raises:
        TimeoutError: it has not happened in time.
    """
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not in {seconds:.0f} s: {what}")
        pause.wait(0.05)


def is_running(pid: int) -> bool:
    """Whether a process is there and has not ended (a zombie has)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def children_of(pid: int) -> set[int]:
    """The processes that a process has started and that have not ended; none where it is gone."""
    found: set[int] = set()
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found |= {int(child) for child in (task / "children").read_text().split()}
    except (FileNotFoundError, ProcessLookupError):
        return set()
    return found
