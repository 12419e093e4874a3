"""A volunteer's peer is paused, resumed and stopped from another terminal."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from tests.integration.cli.conftest import Home, done, error_of, swarm
from tests.integration.swarm.small_swarm import until


def looked_at(join: str) -> tuple[int, list[str]]:
    """How many hosts there are, and why others are paused."""
    found = json.loads(done(swarm("status", join, "--json")).stdout)
    return len(found["hosts"]), [host["paused_by"] for host in found["paused"]]


def test_a_peer_is_paused_resumed_and_stopped_while_paused(home: Home) -> None:
    run = home.init("rest", lora_rank="4", batch_size="4", sequence_length="32", compute_dtype="fp32")
    assert "no peer that holds blocks runs" in error_of(swarm("pause"))
    first = home.start("join", f"{run}/", "--blocks", "0:6", "--host", "127.0.0.1", "--threads", "1")
    join = first.line()
    assert "its run's directory" in error_of(swarm("pause")), "its state is not in the usual place"
    second = home.start(
        *("join", join, "--blocks", "0:6", "--host", "127.0.0.1", "--threads", "1"),
        *("--max-memory", "8GB", "--max-bandwidth", "100Mbit", "--hours", "0-12,12-24"),
    )
    second.line()
    until(lambda: looked_at(join) == (2, []), "both are seen")

    (state,) = done(swarm("pause")).stdout.splitlines()
    path = Path(state.removeprefix("pausing the peer in "))
    assert path.name == "peer-0"
    assert run not in path.parents
    until(lambda: looked_at(join) == (1, ["hand"]), "the second one is paused")
    assert "1 paused" in done(swarm("status", join)).stdout
    assert second.popen.poll() is None, "a paused peer stays"

    done(swarm("resume", join))
    until(lambda: looked_at(join) == (2, []), "it is back")

    done(swarm("pause", f"{run}/"))
    until(lambda: looked_at(join) == (0, ["hand", "hand"]), "both are paused")
    assert second.send(signal.SIGTERM) == 128 + signal.SIGTERM, second.errors()
    assert first.send(signal.SIGTERM) == 128 + signal.SIGTERM, first.errors()
    for process in (first, second):
        assert "paused by hand" in process.errors()
        assert "Traceback" not in process.errors()


def test_too_little_memory_for_one_block_is_one_line(home: Home) -> None:
    run = home.init("small", lora_rank="4", compute_dtype="fp32")
    error = error_of(swarm("join", f"{run}/", "--host", "127.0.0.1", "--max-memory", "100MB"))
    assert "--max-memory 100 MB leaves no room for one block" in error
    assert "give at least" in error
