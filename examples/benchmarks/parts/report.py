"""What a benchmark is asked for and how it answers: progress on stderr, one JSON object or a table at the end."""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

say = Console(stderr=True).print
Values = dict[str, object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """Where a benchmark works, and how thoroughly: `pick(a, b)` is a in a quick run, else b."""

    directory: Path
    quick: bool
    began: float = field(default_factory=time.monotonic)

    def pick(self, quick: int, thorough: int) -> int:
        """How many repeats, tokens or sessions."""
        return quick if self.quick else thorough

    def say(self, text: str) -> None:
        """One line of progress, with the seconds so far."""
        say(f"{time.monotonic() - self.began:6.1f} s  {text}", highlight=False)


def median(values: list[float]) -> float:
    """To three digits."""
    return round(statistics.median(values), 3)


def ratios(ours: list[float], theirs: list[float]) -> float:
    """The median of ratios of values that were measured in turn."""
    return median([one / other for one, other in zip(ours, theirs, strict=True)])


def run_parts(description: str | None, parts: Mapping[str, Callable[[Bench], Values]]) -> None:
    """The command line of a benchmark: measure every part, or those that are named, and say what was found."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="end with one JSON object on stdout; else a table")
    parser.add_argument("--quick", action="store_true", help="fewer repeats: under three minutes on two free cores")
    parser.add_argument("--only", nargs="+", choices=list(parts), default=list(parts), help="these parts alone")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C does: end every process first
    found: Values = {"cores": os.cpu_count() or 1, "quick": given.quick, "load_before": _load()}
    with tempfile.TemporaryDirectory(prefix="swarm-bench-") as name:
        bench = Bench(directory=Path(name), quick=given.quick)
        for part in given.only:
            bench.say(f"[bold]{part}[/bold]")
            values = parts[part](bench)
            bench.say(f"{part}: {json.dumps(values)}")
            found |= values
        found |= {"load_after": _load(), "seconds": round(time.monotonic() - bench.began, 1)}
    if given.json:
        sys.stdout.write(json.dumps(found) + "\n")
        return
    for key, value in found.items():
        say(f"{key:32}{value}")


def _load() -> float:
    return round(os.getloadavg()[0], 2)
