"""What a peer measured, as JSON lines in its state directory; bounded, and readable while it grows."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

NAME = "metrics.jsonl"  # in a peer's state directory
OLD_NAME = "metrics.1.jsonl"
KINDS = ("step", "evaluation", "swarm_evaluation", "round", "round_failed", "peer")
_MOST_BYTES = 8 << 20  # of each of the two files
_MAX_LINE_BYTES = 1 << 14
_MAX_TEXT = 400

Value = float | int | str | bool | None
Note = Callable[[str, Mapping[str, Value]], None]
"""Takes one of KINDS and what was measured; never raises."""


def no_notes(kind: str, values: Mapping[str, Value]) -> None:
    """Keeps nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One line: unix `time` in seconds, its kind, and what was measured. Numbers are finite."""

    time: float
    kind: str
    values: Mapping[str, Value]

    def number(self, name: str) -> float | None:
        """A value as a number, where it is one."""
        value = self.values.get(name)
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


class MetricsLog:
    """Appends to a state directory's file. When that is full it becomes the old one, and the older one goes.

    `sinks` get each entry, too. May be used from any thread.
    """

    def __init__(
        self, directory: Path, *, most_bytes: int = _MOST_BYTES, clock: Callable[[], float] = time.time
    ) -> None:
        self.sinks: list[Callable[[Entry], None]] = []
        self._directory, self._most_bytes, self._clock = directory, most_bytes, clock
        self._lock = threading.Lock()
        self._has_failed = False

    def note(self, kind: str, values: Mapping[str, Value]) -> None:
        """Write one line; values that are not finite are left out. A full disk is logged once, never raised."""
        kept = {name: value for name, value in values.items() if not _is_odd(value)}
        entry = Entry(time=self._clock(), kind=kind, values=kept)
        line = json.dumps({"time": round(entry.time, 3), "kind": kind, **kept}) + "\n"
        with self._lock:
            try:
                self._append(line.encode())
            except OSError as error:
                if not self._has_failed:
                    self._has_failed = True
                    logger.warning("metrics are not written to %s: %s", self._directory / NAME, error.strerror)
        for sink in self.sinks:
            sink(entry)

    def _append(self, line: bytes) -> None:
        path = self._directory / NAME
        if path.exists() and path.stat().st_size + len(line) > self._most_bytes:
            path.replace(self._directory / OLD_NAME)
        with path.open("ab") as file:
            if file.tell() and not _ends_a_line(path):
                file.write(b"\n")  # the last writer was killed in the middle of a line
            file.write(line)


def read_metrics(directory: Path) -> list[Entry]:
    """All entries of a state directory, by time. Lines that are torn or make no sense are passed over."""
    found = [entry for name in (OLD_NAME, NAME) for entry in _entries(directory / name)]
    return sorted(found, key=lambda entry: entry.time)


def _entries(path: Path) -> Iterator[Entry]:
    try:
        with path.open("rb") as file:
            while line := file.readline(_MAX_LINE_BYTES):
                entry = _parse(line)
                if entry is not None:
                    yield entry
    except FileNotFoundError:
        return
    except OSError as error:
        logger.warning("%s cannot be read: %s", path, error.strerror)


def _parse(line: bytes) -> Entry | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    match found:
        case {"time": int(at) | float(at), "kind": str(kind), **rest} if kind in KINDS and 0 <= at < 1e11:
            plain = {
                str(name): value[:_MAX_TEXT] if isinstance(value, str) else value
                for name, value in rest.items()
                if isinstance(value, (int, float, str, type(None))) and not _is_odd(value)
            }
            return Entry(time=float(at), kind=kind, values=plain)
    return None


def _is_odd(value: Value) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"
