"""Processes that a benchmark starts and talks to through pipes. They have one thread for tensors each, and end with the
benchmark, whatever happens to it.

They are forked from a server that has imported what all of them need, which takes four seconds of a core, once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

ANSWER_SECONDS = 180.0

Pipe = Connection  # what a target has as its first argument; it ends when nothing more can be received
Target = Callable[..., None]


class Child:
    """One process that runs `target(pipe, *arguments)`; all must be picklable."""

    def __init__(self, name: str, target: Target, *arguments: object) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["parts.gloo", "parts.rival_averager", "parts.round_peers"])
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(target, theirs, *arguments), name=name)
        with _one_thread():
            self._process.start()
        theirs.close()

    def send(self, value: object) -> None:
        """Give it something to do."""
        try:
            self._pipe.send(value)
        except OSError as error:
            raise SystemExit(f"{self.name} has ended; its error is above") from error

    def receive(self, seconds: float = ANSWER_SECONDS) -> Any:
        """What it says next."""
        try:
            if not self._pipe.poll(seconds):
                raise SystemExit(f"{self.name} said nothing for {seconds:g} s")
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            raise SystemExit(f"{self.name} has ended; its error is above") from error

    def kill(self) -> None:
        """SIGKILL, at once. Returns when it is gone."""
        self._process.kill()
        self._process.join()

    def hang_up(self) -> None:
        """Nothing more will be asked: it ends by itself."""
        self._pipe.close()

    def stop(self, grace_seconds: float) -> None:
        """End it, and what it started and left behind; by force when it has not ended by itself in time."""
        self.hang_up()
        self._process.join(grace_seconds)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid or 0, signal.SIGKILL)  # its own group, see `_work`
        self._process.kill()
        self._process.join()


@contextmanager
def children(grace_seconds: float = 15.0) -> Iterator[list[Child]]:
    """A list to put children on; those on it are stopped at the end."""
    started: list[Child] = []
    try:
        yield started
    finally:
        for child in started:
            child.hang_up()
        for child in started:
            child.stop(grace_seconds)


def ask(asked: Sequence[Child], value: object) -> list[Any]:
    """The answers of all to the same question, in their order."""
    for child in asked:
        child.send(value)
    return [child.receive() for child in asked]


def moment(lead_seconds: float) -> float:
    """When something that is asked for now shall begin, by the clock of this machine."""
    return time.time() + lead_seconds


def _work(target: Target, pipe: Connection, *arguments: object) -> None:
    os.setpgid(0, 0)
    with suppress(EOFError):  # the benchmark hung up, or is gone
        target(pipe, *arguments)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Children read this when they import torch."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
