"""Hosts that `swarm serve` has started do not outlive it: neither `kill -9` nor a goodbye leaves anything behind."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from tests.integration.cli.conftest import Home
from tests.integration.swarm.small_swarm import until

pytest.importorskip("uvicorn", reason="needs the gateway: pip install 'swarmtune[gateway]'")

SECONDS = 180.0


def children(pid: int) -> list[int]:
    words = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in words for child in path.read_text().split()]


def living(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize(("number", "count"), [(signal.SIGKILL, 2), (signal.SIGINT, 1)], ids=["kill -9", "Ctrl-C"])
def test_local_hosts_leave_in_order_when_their_parent_is_gone(
    home: Home, tmp_path: Path, number: signal.Signals, count: int
) -> None:
    run = home.init(str(tmp_path / "lab"), lora_rank="4", compute_dtype="fp32")
    serve = home.start("serve", f"{run}/", "--local-hosts", str(count), "--port", "0")
    assert serve.line().startswith("http://")
    hosts = [int(pid) for pid in re.findall(r"host process (\d+) holds blocks", serve.errors())]
    assert len(hosts) == count, serve.errors()
    family = [*hosts, *(child for host in hosts for child in children(host))]
    assert len(family) == 2 * count, "each host has its p2pd"
    assert living(family) == family
    # A terminal's Ctrl-C goes to the whole group, in which the hosts are not: they would be told twice.
    serve.send(number, group=number == signal.SIGINT)
    until(lambda: not living(family), "hosts and their p2pd are gone", seconds=SECONDS)
    for place in range(count):
        log = (run / "hosts" / str(place) / "log.txt").read_text()
        assert "this peer's state is kept" in log, log
        assert "Traceback" not in log, log
        assert list((run / "hosts" / str(place) / "checkpoints").glob("round-*.safetensors")), "nothing was saved"
