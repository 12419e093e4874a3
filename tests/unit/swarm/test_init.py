"""`swarm init` writes settings and key, both or neither, and refuses to touch an existing run."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

import swarm
from blocks.errors import BadAdapter
from swarm.cli.main import main
from swarm.config_file import load_config
from swarm.errors import BadConfig, BadJoinString
from swarm.join_string import Join, resolve_join, save_join, target_run_id
from swarm.new_run import create_run
from swarm.run import RunId, load_owner_key, open_run, public_bytes, run_id_of, sign_run

MODEL = {"name": "m", "fingerprint": "ab" * 32, "num_blocks": 4}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 3,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
NAMES = ("model.embed_tokens.weight", *(f"model.layers.{number}.mlp.up_proj.weight" for number in range(3)))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(LLAMA))
    save_file({name: torch.zeros(2, 2) for name in NAMES}, path / "model.safetensors")
    return path


def call(*words: str) -> Result:
    return CliRunner().invoke(main, ["init", *words])


def test_a_new_run_can_be_signed_and_opened(tmp_path: Path) -> None:
    run = create_run(tmp_path / "tales", {"model": MODEL, "adapter": {"lora_rank": 4}})
    spec, key = load_config(tmp_path / "tales"), load_owner_key(tmp_path / "tales" / "owner.key")
    assert spec == run.spec
    assert (spec.name, spec.adapter.lora_rank) == ("tales", 4)
    assert open_run(sign_run(spec, key), run.run_id) == spec
    assert target_run_id(resolve_join(str(tmp_path / "tales"))) == run.run_id == run_id_of(public_bytes(key), spec)


def test_a_join_string_of_another_run_beside_the_settings_is_refused(tmp_path: Path) -> None:
    run = create_run(tmp_path / "tales", {"model": MODEL})
    peer = "/ip4/127.0.0.1/tcp/31330/p2p/12D3KooWEhjTZkKK4DN2rbq2zMkLKrxjYPGGfXhQJ8KmWPzXHtXb"
    save_join(run.directory, Join(run_id=run.run_id, run_name="tales", peers=(peer,)))
    assert target_run_id(resolve_join(str(run.directory))) == run.run_id
    save_join(run.directory, Join(run_id=RunId("0" * 32), run_name="tales", peers=(peer,)))
    with pytest.raises(BadJoinString, match=r"join\.txt is of another run"):
        target_run_id(resolve_join(str(run.directory)))


def test_an_existing_run_is_not_touched(tmp_path: Path) -> None:
    create_run(tmp_path / "tales", {"model": MODEL})
    before = {one.name: one.read_bytes() for one in (tmp_path / "tales").iterdir()}
    with pytest.raises(BadConfig, match="exists already"):
        create_run(tmp_path / "tales", {"model": MODEL})
    assert {one.name: one.read_bytes() for one in (tmp_path / "tales").iterdir()} == before


def test_wrong_settings_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="lora_rank"):
        create_run(tmp_path / "tales", {"model": MODEL, "adapter": {"lora_rank": 0}})
    assert not (tmp_path / "tales").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(BadConfig, match="cannot be made"):
        create_run(tmp_path / "file" / "tales", {"model": MODEL})


def test_the_command_finds_the_model_and_writes_its_numbers(tmp_path: Path, model: Path) -> None:
    target = tmp_path / "runs" / "tales"
    result = call(
        str(target),
        "--model",
        str(model),
        "--lora-targets",
        "q_proj, v_proj",
        "--batch-size",
        "8",
        "--wire-dtype",
        "fp32",
    )
    assert result.exit_code == 0, result.output
    assert f"swarm join {target}" in result.stderr.replace("\n", "")
    spec = load_config(target)
    assert (spec.name, spec.model.name, spec.model.num_blocks) == ("tales", str(model), 3)
    assert len(spec.model.weights) == 4 * 4  # what is outside, and three blocks
    assert (spec.adapter.lora_targets, spec.training.batch_size, spec.wire.dtype) == (("q_proj", "v_proj"), 8, "fp32")


def test_a_target_that_the_model_does_not_have_is_one_line_and_no_run(model: Path, tmp_path: Path) -> None:
    result = call(str(tmp_path / "tales"), "--model", str(model), "--lora-targets", "q_proj,v_prj")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: adapter.lora_targets has 'v_prj'")
    with pytest.raises(BadAdapter, match="v_prj"):
        swarm.init(tmp_path / "tales", model, cache_dir=tmp_path, adapter={"lora_targets": ["v_prj"]})
    assert not (tmp_path / "tales").exists()


def test_an_unknown_model_is_one_line_and_no_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = call(str(tmp_path / "tales"), "--model", str(tmp_path / "empty"))
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "tales").exists()


@pytest.mark.parametrize("name", ["", " ", "..", "-", "a\nb", "a" * 65])
def test_what_no_run_can_be_called_is_refused_before_the_model_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    found = call("--model", "nowhere", "--", name)
    assert found.exit_code == 1
    (line,) = found.output.splitlines()
    assert line.startswith("Error: ")
    assert ("NAME is ''; use a new directory, such as tales" if name == "" else "use 1 to 64 letters") in line
    with pytest.raises(BadConfig):
        swarm.init(name, "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_there_is_named_before_the_model_is_looked_for(tmp_path: Path) -> None:
    create_run(tmp_path / "tales", {"model": MODEL})
    assert "exists already; choose another NAME" in call(str(tmp_path / "tales"), "--model", "nowhere").output
    with pytest.raises(BadConfig, match="exists already"):
        swarm.init(tmp_path / "tales", "nowhere")
