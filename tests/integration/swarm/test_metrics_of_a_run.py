"""A run that was evaluated can be read afterwards: metrics of every peer, a page of them, and the best adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from swarm.cli.main import main
from swarm.reports.metrics import read_metrics
from swarm.reports.run_report import find_metrics
from swarm.training.best_adapter import BEST, read_best
from tests.integration.swarm.conftest import MakeSwarm
from tests.integration.swarm.small_swarm import BACK, FRONT, host_of, random_samples, until

BATCH, STEPS = 4, 8
SETTINGS = {"training": {"batch_size": BATCH, "learning_rate": 1e-2}, "rounds": {"round_samples": 4 * BATCH}}


def test_a_run_can_be_read_afterwards(make_swarm: MakeSwarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarm.node._METRICS_SECONDS", 0.5)
    swarm = make_swarm(SETTINGS)
    swarm.hosts(a=FRONT, b=BACK)
    trainer = swarm.enter("trainer")
    data = random_samples(16)
    result = trainer.train(data, steps=STEPS, held_out=data, last_round=1)
    until(lambda: all(host_of(swarm.peers[name]).round >= 1 for name in "ab"), "round 1")

    states = swarm.run / "states"
    own = read_metrics(states / "trainer")
    steps = [entry for entry in own if entry.kind == "step"]
    assert [entry.number("loss") for entry in steps] == list(result.losses)
    assert [entry.number("step") for entry in steps] == list(range(1, STEPS + 1))
    told = [(entry.number("round"), entry.number("loss")) for entry in own if entry.kind == "evaluation"]
    assert told == [(found.round, found.loss) for found in result.evaluations]
    until(lambda: any(entry.kind == "round" for entry in read_metrics(states / "a")), "a line about the round")
    rounds = [entry for entry in read_metrics(states / "a") if entry.kind == "round"]
    assert rounds[0].values["applied"] == 3
    assert rounds[0].values["samples"] >= 4 * BATCH
    until(lambda: any(entry.kind == "peer" for entry in read_metrics(states / "b")), "a line about the peer")

    best = read_best(states / "trainer" / BEST)
    after = [found for found in result.evaluations if found.round >= 1]
    assert best is not None
    assert (best.round, best.loss) in [(found.round, found.loss) for found in after]

    out = tmp_path / "report.html"
    if find_metrics(swarm.run):
        pytest.importorskip("matplotlib", reason="needs the package matplotlib: pip install 'swarmtune[report]'")
    shown = CliRunner().invoke(main, ["report", str(swarm.run), "--out", str(out)])
    assert shown.exit_code == 0, shown.output
    assert {"report-loss.png", "report-rounds.png", "report-peers.png"} <= {
        path.name for path in tmp_path.glob("*.png")
    }
    assert out.read_text().count("data:image/png") == len(list(tmp_path.glob("*.png")))

    command = ["export", str(swarm.run), str(tmp_path / "adapter"), "--best", "--state", str(states / "trainer")]
    exported = CliRunner().invoke(main, command)
    assert exported.exit_code == 0, exported.output
    assert f"{best.loss:.4f}" in exported.output
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
