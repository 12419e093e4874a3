"""Host processes on this machine, each a `swarm join`: for the demo, for benchmarks, and for tests that kill them.

They leave in order when the process that started them ends, however it ends: each has a pipe from it as standard input.
"""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from blocks.spans import Span
from swarm.errors import SwarmError
from swarm.join_string import Join, format_join, parse_join

LOOPBACK = "127.0.0.1"
_STOP_SECONDS = 20.0
_TAIL_LINES = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalHost:
    """How to start one host: what it enters, the blocks it holds, and its own state directory.

    `extra` are further options of `swarm join`. `cache_home` is where converted models are. `program` is what Python
    runs; tests give one that fails at a chosen moment.
    """

    target: Join | Path
    span: Span
    state: Path
    cache_home: Path
    threads: int = 1
    extra: tuple[str, ...] = ()
    program: tuple[str, ...] = ("-m", "swarm.cli.main")


class HostProcess:
    """One running host. Its log is `state/log.txt`; its first line of output is the join string."""

    def __init__(self, host: LocalHost) -> None:
        self.host = host
        self._join: Join | None = None
        host.state.mkdir(parents=True, exist_ok=True)
        self.log = host.state / "log.txt"
        target = str(host.target) if isinstance(host.target, Path) else format_join(host.target)
        # env(1) adds to the environment that this process hands on, which nothing below the command line reads.
        command = ["env", f"OMP_NUM_THREADS={host.threads}", "TOKENIZERS_PARALLELISM=false"]
        command += [f"XDG_CACHE_HOME={host.cache_home}", sys.executable, *host.program, "-v", "join", target]
        command += ["--blocks", str(host.span), "--state", str(host.state), "--host", LOOPBACK]
        command += ["--threads", str(host.threads), "--until-eof", *host.extra]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                process_group=0,  # Ctrl-C in a terminal is for whoever started it, who then stops it in order
            )
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The process id."""
        return self.process.pid

    @property
    def join(self) -> Join:
        """The join string that it printed when it was ready."""
        if self._join is None:
            raise SwarmError(f"host of blocks {self.host.span} is not ready yet; call wait_ready first")
        return self._join

    def wait_ready(self, *, seconds: float) -> Join:
        """Until it serves its blocks; gives the join string that it printed.

        Raises:
            SwarmError: it ended, or did not get ready in time; the message holds the end of its log.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                self._join = parse_join(self._lines.get(timeout=0.2))
                return self._join
            except queue.Empty:
                if self.process.poll() is not None:
                    break
        raise SwarmError(f"host of blocks {self.host.span} did not start: {self.tail()}")

    def tail(self) -> str:
        """The end of its log, on one line."""
        lines = self.log.read_text("utf-8", "replace").splitlines()
        return " / ".join(lines[-_TAIL_LINES:]) or "its log is empty"

    def kill(self) -> None:
        """`kill -9`, and no goodbye."""
        self.process.kill()
        self._finish()

    def stop(self) -> None:
        """Ask it to leave; kill it if it does not."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self._finish()

    def _finish(self) -> None:
        self.process.wait()
        self._reader.join(timeout=_STOP_SECONDS)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip():
                self._lines.put(line)


@contextmanager
def local_hosts(
    first: LocalHost, others: Sequence[tuple[Span, Path]], *, seconds: float, by_directory: bool = False
) -> Iterator[list[HostProcess]]:
    """Start `first`, then the others through it, all at once; stops them all at the end. The others enter by its join
    string, or `by_directory`, as into a private run, by the run's own.

    Raises:
        SwarmError: one of them did not get ready within `seconds`.
    """
    running = [HostProcess(first)]
    try:
        join = running[0].wait_ready(seconds=seconds)
        for span, state in others:
            host = LocalHost(
                target=first.target if by_directory else join,
                span=span,
                state=state,
                cache_home=first.cache_home,
                threads=first.threads,
                extra=first.extra,
            )
            running.append(HostProcess(host))
        for process in running[1:]:
            process.wait_ready(seconds=seconds)
        yield running
    finally:
        for process in running:
            process.stop()
