"""hivemind's own DecentralizedAverager on the same tensors, each in a process of its own (it forks more)."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import hivemind
import torch
from hivemind.averaging import DecentralizedAverager
from parts.children import Child, Pipe, ask, children, moment
from parts.round_peers import LEAD_SECONDS, units_of

from swarm.local import LOOPBACK

_ROUND_SECONDS = 20.0  # a round without an end is as long as this
_LISTEN = f"/ip4/{LOOPBACK}/tcp/0"
Settings = Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stepped:
    """How long it took, and how many peers there were in the group: 0 when it failed."""

    seconds: float
    peers: int


class Rivals:
    """Such peers, in the parent."""

    def __init__(self, processes: list[Child]) -> None:
        self._processes = processes

    @classmethod
    @contextmanager
    def of(cls, settings: Settings, num_peers: int, parameters: int) -> Iterator[Rivals]:
        """`num_peers` of them with these settings, ready; all end with the context."""
        with children(grace_seconds=0.0) as processes:  # hivemind's own end takes seconds, and p2pd half a minute
            bootstrap: list[str] = []
            for index in range(num_peers):
                processes.append(Child(f"hivemind's peer {index}", serve, (index, parameters), settings, bootstrap))
                bootstrap = bootstrap or [processes[0].receive()]
            for child in processes[1:]:
                child.receive()
            yield cls(processes)

    def step(self) -> tuple[float, bool]:
        """The seconds of one round by the slowest peer, and whether all were in one group."""
        found: list[Stepped] = ask(self._processes, moment(LEAD_SECONDS))
        return max(each.seconds for each in found), all(each.peers == len(self._processes) for each in found)


def serve(pipe: Pipe, tensors_of: tuple[int, int], settings: Settings, bootstrap: list[str]) -> None:
    """The work of such a process: make an averager, then average at every moment that comes."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # hivemind's processes inherit what cannot be pickled
    dht = hivemind.DHT(initial_peers=bootstrap, host_maddrs=[_LISTEN], start=True)
    averager = _averager(dht, tensors_of, settings)
    pipe.send(next(str(address) for address in dht.get_visible_maddrs()))
    while True:
        pipe.send(_step(averager, pipe.recv()))


def _averager(dht: hivemind.DHT, tensors_of: tuple[int, int], settings: Settings) -> DecentralizedAverager:
    tensors = [tensor for unit in units_of(*tensors_of).values() for tensor in unit.values()]
    return DecentralizedAverager(
        tensors, dht, start=True, prefix="bench", allreduce_timeout=_ROUND_SECONDS / 2, **settings
    )


def _step(averager: DecentralizedAverager, begin_at: float) -> Stepped:
    time.sleep(max(0.0, begin_at - time.time()))
    try:
        gathered = averager.step(gather={}, timeout=_ROUND_SECONDS)
    except Exception:  # of whatever kind: hivemind hands on what its process raised
        gathered = None
    return Stepped(seconds=time.time() - begin_at, peers=len(gathered or ()))
