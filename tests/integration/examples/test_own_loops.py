"""The examples of one's own loops do what they say: two members' adapters are equal after the last round, and learn."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from peft import PeftModel

EXAMPLES = Path(__file__).parents[3] / "examples"
GUESSING = torch.log(torch.tensor(64.0)).item()

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries about themselves


def run(name: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    monkeypatch.setenv("HOME", str(directory / "home"))
    monkeypatch.chdir(directory)
    found: list[object] = runpy.run_path(str(EXAMPLES / name))["main"](directory)
    assert len(found) == 2
    return found


def check(*models: object) -> None:
    """Equal to the bit, trained, and better than guessing at rows that count upwards."""
    adapters = []
    for model in models:
        assert isinstance(model, PeftModel)
        adapters.append({name: each for name, each in model.named_parameters() if each.requires_grad})
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())
    assert all(bool(tensor.any()) for tensor in adapters[0].values())
    ids_BT = torch.stack([(torch.arange(24) + 3 * row) % 64 for row in range(16)])
    model = models[0]
    assert isinstance(model, PeftModel)
    model.eval()
    with torch.no_grad():
        learnt = model(input_ids=ids_BT, labels=ids_BT).loss.item()
        with model.disable_adapter():
            before = model(input_ids=ids_BT, labels=ids_BT).loss.item()
    assert learnt < min(before, GUESSING) - 0.5, (learnt, before)


def test_two_plain_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(*run("02_own_loop.py", tmp_path, monkeypatch))


def test_two_hugging_face_trainers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs the package accelerate")
    trainers = run("03_hf_trainer.py", tmp_path, monkeypatch)
    check(*(trainer.model for trainer in trainers))  # type: ignore[attr-defined]
    for trainer in trainers:
        held_out = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]  # type: ignore[attr-defined]
        assert held_out[-1] < held_out[0]


@pytest.mark.usefixtures("sigchld")
def test_two_loops_of_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning", reason="needs the package lightning: pip install 'swarmtune[loops]'")
    modules = run("04_lightning.py", tmp_path, monkeypatch)
    check(*(module.model for module in modules))  # type: ignore[attr-defined]
