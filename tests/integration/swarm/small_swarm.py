"""A whole swarm inside one test: a tiny model on disk, and peers that are started, killed and started again."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from parts.tiny_model import BACK, FRONT, NUM_BLOCKS, VOCAB_SIZE, WHOLE, save_tiny_model

from blocks.source import ModelSource, find_model
from blocks.spans import Span
from peers.config import NetworkConfig
from swarm.data.stream import SampleSet
from swarm.hosts.host import Host
from swarm.hosts.loading import HostingConfig
from swarm.join_string import RunDirectory
from swarm.new_run import create_run
from swarm.peer import Peer
from swarm.peer_config import PeerConfig

NO_ROUNDS = 10**9
CACHE_BYTES = 64 << 20
__all__ = ["BACK", "FRONT", "NUM_BLOCKS", "VOCAB_SIZE", "WHOLE", "SmallSwarm", "save_tiny_model"]
Tables = Mapping[str, Mapping[str, object]]


def random_samples(count: int, *, shortest: int = 8, longest: int = 40, seed: int = 5) -> SampleSet:
    """Rows of random tokens and random lengths; the first third of each row has no label, as a prompt has none."""
    dice = np.random.default_rng(seed)
    lengths = dice.integers(shortest, longest + 1, size=count)
    ids = dice.integers(3, VOCAB_SIZE, size=int(lengths.sum())).astype(np.int32)
    labels = ids.copy()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    for start, length in zip(offsets[:-1], lengths, strict=True):
        labels[start : start + length // 3] = -100
    return SampleSet(ids=ids, labels=labels, offsets=offsets, fingerprint=f"random-{count}-{seed}")


def until(happened: Callable[[], bool], what: str, *, seconds: float = 180.0) -> None:
    """Wait for something that another thread brings about."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not happened():
        assert time.monotonic() < deadline, f"not in {seconds:.0f} s: {what}"
        pause.wait(0.05)


def host_of(peer: Peer) -> Host:
    """What a peer holds."""
    assert peer.node.hosting is not None
    return peer.node.hosting.host


def kill(peer: Peer) -> None:
    """Take a peer off the network at once, as kill -9 of its machine would: nothing is closed or said."""
    os.kill(peer.node.network.p2p.pid, signal.SIGKILL)


def block_samples(peer: Peer) -> dict[int, int]:
    """Samples that one host has committed, per block; while no round was applied."""
    tallies = host_of(peer).trainer.ledger.tallies
    return {block: tally.total_samples for block, tally in tallies.items()}


@dataclass(kw_only=True)
class SmallSwarm:
    """The peers of one run. Each keeps its state under its name, so that it can be started again."""

    source: ModelSource
    run: Path
    cache_dir: Path
    peers: dict[str, Peer] = field(default_factory=dict)

    @classmethod
    def create(cls, root: Path, model: str, cache_dir: Path, settings: Tables, *, name: str = "run") -> SmallSwarm:
        """A new run in `root`; `settings` are tables of swarm.toml, on top of fp32 and no rounds."""
        source = find_model(model, cache_dir=cache_dir)
        tables: dict[str, object] = {
            "training": {"batch_size": 4, "learning_rate": 1e-2, "clip_norm": 0.0},
            "rounds": {"round_samples": NO_ROUNDS},
            "wire": {"dtype": "fp32"},
        } | {name: dict(table) for name, table in settings.items() if name != "model"}
        tables["model"] = {
            "name": model,
            "fingerprint": source.fingerprint,
            "num_blocks": source.num_blocks,
            "compute_dtype": "fp32",
            **settings.get("model", {}),
        }
        create_run(root / name, tables)
        return cls(source=source, run=root / name, cache_dir=cache_dir)

    def config(self, name: str, *, route_seconds: float = 60.0, model: str | None = None) -> PeerConfig:
        return PeerConfig(
            state_root=self.run / "states",
            state=self.run / "states" / name,
            cache_dir=self.cache_dir,
            network=NetworkConfig(host="127.0.0.1"),
            num_threads=1,
            route_seconds=route_seconds,
            model=model,
        )

    def enter(self, name: str, config: PeerConfig | None = None) -> Peer:
        """A peer that holds nothing; the first one of a run starts it."""
        living = next(iter(self.peers.values()), None)
        target = RunDirectory(path=self.run, join=None) if living is None else living.join
        self.peers[name] = peer = Peer.enter(target, config or self.config(name))
        return peer

    def host(self, name: str, span: Span) -> Peer:
        """A peer that holds `span`."""
        peer = self.peers.get(name) or self.enter(name)
        self.hold(peer, span)
        return peer

    def hold(self, peer: Peer, span: Span | None) -> Span:
        return peer.hold(span, HostingConfig(cache_dir=self.cache_dir, num_threads=1, cache_bytes=CACHE_BYTES))

    def hosts(self, **spans: Span) -> list[Peer]:
        """Several hosts, which load at the same time; uvloop cannot start processes from two loops at the same time."""
        peers = [self.enter(name) for name in spans]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(self.hold, peers, spans.values()))
        return peers

    def stop(self, *names: str) -> None:
        """Close peers in order."""
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda name: self.peers.pop(name).close(), names))

    def kill(self, name: str) -> Peer:
        """Kill a peer's network; what is left of it is closed with the swarm."""
        kill(self.peers[name])
        return self.peers[name]

    def close(self) -> None:
        self.stop(*self.peers)
