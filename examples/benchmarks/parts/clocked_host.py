"""`swarm` as a process whose wall clock is off by what stands in a file, from one moment to the next.

Run as `python clocked_host.py FILE join …`: FILE holds one float64, the seconds to add; the other arguments are those
of `swarm`. Only Python's clock moves, as it is the one that dates records and rounds.
"""

from __future__ import annotations

import mmap
import struct
import sys
import time
from pathlib import Path

SECONDS = struct.Struct("d")


def set_clock(path: Path, seconds: float) -> None:
    """Let the clock of the process that reads `path` be off by so much from now on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_bytes(SECONDS.pack(seconds))
        return
    with path.open("r+b") as file, mmap.mmap(file.fileno(), SECONDS.size) as shared:
        shared[:] = SECONDS.pack(seconds)  # in place: the process has this very file mapped


def follow_clock(path: Path) -> None:
    """Let this process tell the time by `path`."""
    with path.open("rb") as file:
        shared = mmap.mmap(file.fileno(), SECONDS.size, access=mmap.ACCESS_READ)
    true_time, true_time_ns = time.time, time.time_ns

    def off() -> float:
        return float(SECONDS.unpack_from(shared)[0])

    time.time = lambda: true_time() + off()
    time.time_ns = lambda: true_time_ns() + round(off() * 1e9)


if __name__ == "__main__":
    follow_clock(Path(sys.argv.pop(1)))
    from swarm.cli.main import main  # after the clock was set: modules take `time.time` by name

    main()
