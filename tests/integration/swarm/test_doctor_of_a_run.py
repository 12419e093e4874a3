"""`swarm doctor JOIN` asks a host of the run to dial this machine, over real transports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from peers import dialling_back
from swarm import doctor
from swarm.cli.main import main
from tests.integration.swarm.conftest import MakeSwarm
from tests.integration.swarm.small_swarm import FRONT


def test_a_host_of_a_private_run_dials_this_machine_and_not_again_at_once(
    make_swarm: MakeSwarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    finding = doctor.Finding(check="multicast", verdict=doctor.Verdict.OK, words="")
    monkeypatch.setattr(doctor, "check_multicast", lambda host: finding)
    monkeypatch.setattr(dialling_back, "AGAIN_SECONDS", 3600.0)  # the second command may be slow to come
    swarm = make_swarm({"security": {"private": True}})
    host = swarm.host("host", FRONT)

    def dialled(*more: str) -> str:
        shown = CliRunner().invoke(main, ["doctor", str(swarm.run), "--json", "--host", "127.0.0.1", *more])
        found = {each["check"]: each for each in json.loads(shown.stdout)["findings"]}
        assert found["run"]["words"] == "1 of 1 hosts answer"
        return str(found["dialled"]["words"])

    assert dialled().startswith(f"{host.id} can dial this machine at 127.0.0.1 port ")
    # Named by --peer, it is asked once all the same.
    assert f"{host.id} says: 127.0.0.1 was dialled just now" in dialled("--peer", host.join.peers[0])
