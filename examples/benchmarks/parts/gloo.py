"""torch's own all-reduce over TCP among processes of this machine: the floor under everybody's."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from parts.children import Child, Pipe, ask, children
from torch import distributed


class Gloo:
    """A group of processes that all-reduce a vector of `parameters` values when asked to."""

    def __init__(self, processes: list[Child]) -> None:
        self._processes = processes

    @classmethod
    @contextmanager
    def of(cls, directory: Path, num_peers: int, parameters: int) -> Iterator[Gloo]:
        """The group, ready; it ends with the context."""
        with children() as processes:
            for rank in range(num_peers):
                name = f"process {rank} of gloo"
                processes.append(Child(name, serve, directory / "gloo", (rank, num_peers), parameters))
            gloo = cls(processes)
            gloo.measure(2)  # warms up, and the first connects
            yield gloo

    def measure(self, repeats: int) -> list[float]:
        """The seconds of each all-reduce, by the slowest process."""
        return [max(each) for each in zip(*ask(self._processes, repeats), strict=True)]


def serve(pipe: Pipe, rendezvous: Path, place: tuple[int, int], parameters: int) -> None:
    """The work of such a process."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    rank, num_peers = place
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=num_peers)
    vector = torch.randn(parameters)
    try:
        while True:
            seconds = []
            for _ in range(pipe.recv()):
                distributed.barrier()
                began = time.perf_counter()
                distributed.all_reduce(vector)
                seconds.append(time.perf_counter() - began)
                vector /= num_peers
            pipe.send(seconds)
    finally:
        distributed.destroy_process_group()
