"""Doing what a plan of faults says to a host's processes and its link, and undoing it. No root is needed."""

from __future__ import annotations

import random
import resource
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from parts.swarms import LinkRules

LOOPBACK = "127.0.0.1"
CLOCK_SECONDS = 10.0
SLOW_LINK = LinkRules(one_way_seconds=0.1, bits_per_second=4e6)
_GARBAGE_PAUSE_SECONDS = 0.1
_HELD_OPEN = 64


def forbid_growth(pid: int) -> None:
    """Let every write of the process that makes a file longer fail (EFBIG), as on a disk without a free byte.

    A limit of the process, as filling a disk would need one of its own, which only root can mount. The error's number
    differs from a full disk's; it comes at the same calls.
    """
    with suppress(ProcessLookupError):
        _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, most))


def allow_growth(pid: int) -> None:
    """The end of it."""
    with suppress(ProcessLookupError):
        _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, most))


class Garbage:
    """Strangers at one port, until `stop`: some send random bytes, others begin as libp2p does and say nothing more."""

    def __init__(self, port: int, seed: int) -> None:
        self._port, self._dice = port, random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"garbage to {port}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Close all that was opened."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        held: list[socket.socket] = []
        while not self._stop.wait(_GARBAGE_PAUSE_SECONDS):
            with suppress(OSError):  # refused, or closed on us: what a host may do with strangers
                stranger = socket.create_connection((LOOPBACK, self._port), timeout=1.0)
                held.append(stranger)
                stranger.sendall(self._words())
            while len(held) > _HELD_OPEN:
                held.pop(0).close()
        for stranger in held:
            stranger.close()

    def _words(self) -> bytes:
        greeting = b"\x13/multistream/1.0.0\n"
        return self._dice.choice([b"", greeting, greeting + self._dice.randbytes(200), self._dice.randbytes(100_000)])


@dataclass
class Later:
    """Things to do after some seconds, each in its own thread; `join` waits for them and raises what went wrong."""

    timers: list[threading.Timer] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)

    def add(self, seconds: float, action: Callable[[], None]) -> None:
        """Do `action` in `seconds`."""

        def act() -> None:
            try:
                action()
            except BaseException as error:  # told by join
                self.errors.append(error)

        timer = threading.Timer(seconds, act)
        timer.daemon = True
        self.timers.append(timer)
        timer.start()

    def join(self) -> None:
        """Until all is done, what was added meanwhile included."""
        while self.timers:
            self.timers.pop().join()
        if self.errors:
            raise self.errors.pop()

    def cancel(self) -> None:
        """What has not begun is not done any more."""
        for timer in list(self.timers):
            timer.cancel()
