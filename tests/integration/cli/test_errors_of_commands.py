"""What goes wrong before there is a swarm: each in one line that says what to do, without a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from swarm.join_string import Join, format_join
from swarm.run import RunId
from tests.integration.cli.conftest import Home, error_of, swarm

GONE = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWEhjTZkKK4DN2rbq2zMkLKrxjYPGGfXhQJ8KmWPzXHtXb"


@pytest.fixture(scope="module")
def run(home: Home) -> Path:
    return home.init("lonely", batch_size="2", sequence_length="16")


def copy_of(home: Home, name: str) -> Path:
    return shutil.copytree(home.model, home.path / name)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("nobody/nothing-here", "hub"),
        ("no-such-directory/x/y/z", "neither a path that exists nor a hub id"),
        ("missing.gguf", "give the path of a .gguf file that exists"),
        ("package:no_such_package", "pip install"),
    ],
)
def test_an_unknown_model_is_refused_by_init(home: Home, model: str, words: str) -> None:
    assert words in error_of(swarm("init", str(home.path / "never"), "--model", model))
    assert not (home.path / "never").exists()


@pytest.mark.parametrize("family", ["t5", "bert", "mamba", "no_such_family"])
def test_an_architecture_that_cannot_be_cut_is_refused_by_init(home: Home, family: str) -> None:
    model = copy_of(home, f"model-{family}")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": family}))
    error = error_of(swarm("init", str(home.path / "never"), "--model", str(model)))
    assert family in error
    assert not (home.path / "never").exists()


def test_missing_tensors_are_named_by_join(home: Home) -> None:
    model = copy_of(home, "model-torn")
    tensors = load_file(model / "model.safetensors")
    lost = [name for name in tensors if name.startswith("model.layers.2.")]
    save_file({name: value for name, value in tensors.items() if name not in lost}, model / "model.safetensors")
    torn = home.path / "torn"
    assert swarm("init", str(torn), "--model", str(model)).exit_code == 0
    error = error_of(swarm("join", str(torn), "--blocks", "0:6", "--host", "127.0.0.1"))
    assert "lacks" in error
    assert "model.layers.2." in error or "layers.2." in error


def test_a_second_run_in_the_same_directory_is_refused(home: Home, run: Path) -> None:
    assert "exists already" in error_of(swarm("init", str(run), "--model", str(home.model)))


def test_a_setting_out_of_range_is_refused(home: Home) -> None:
    error = error_of(swarm("init", str(home.path / "never"), "--model", str(home.model), "--lora-rank", "0"))
    assert "lora_rank" in error


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace("lora_rank", "lora_rang"), "the nearest one is adapter.lora_rank"),
        (lambda text: text.replace("batch_size = 2", "batch_size = -2"), "batch_size"),
        (lambda text: text + "\n[broken", "is not TOML"),
    ],
)
def test_a_bad_swarm_toml_is_refused(home: Home, run: Path, change: Callable[[str], str], words: str) -> None:
    bad = home.path / "bad"
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(run, bad)
    (bad / "swarm.toml").write_text(change((bad / "swarm.toml").read_text()))
    error = error_of(swarm("join", str(bad)))
    assert words in error
    assert "swarm.toml" in error


def test_training_before_anybody_joined_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("Once upon a time")
    error = error_of(swarm("train", str(run), "--data", str(tmp_path / "x.txt")))
    assert "no peer of this run is known yet" in error
    assert f"swarm join {run}" in error


def test_what_cannot_be_is_refused_before_anything_is_entered(run: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("Once upon a time")
    missing = str(tmp_path / "y.jsonl")
    refused = {
        ("join", "--announce", "1.2.3.4"): "network.announce has '1.2.3.4'; use an address such as /ip4/",
        ("join", "--nickname", "x" * 49): "use at most 48 characters",
        ("train", "--data", str(tmp_path / "x.txt"), "--eval-data", missing): f"{missing} cannot be read",
    }
    for (command, *words), error in refused.items():
        assert error in error_of(swarm(command, str(run), *words))


def test_a_bootstrap_peer_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarm.commands._CLIENT_START_SECONDS", 1.0)
    join = format_join(Join(run_id=RunId("ab" * 16), run_name="gone", peers=(GONE,)))
    error = error_of(swarm("status", join))
    assert "no bootstrap peer answered" in error
    assert "newer join string" in error
