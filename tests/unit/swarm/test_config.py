"""swarm.toml: every setting is checked, and every error names the setting and what to use."""

import tomllib
from dataclasses import fields, replace
from pathlib import Path

import pytest

from swarm.config import SECTIONS, AdapterSettings, ModelSettings, RoundSettings, RunSpec, TrainingSettings
from swarm.config_file import config_text, load_config, spec_from_tables, tables_of, write_config
from swarm.errors import BadConfig

SPEC = RunSpec(
    name="tales",
    nonce="0f" * 16,
    model=ModelSettings(name='C:\\odd "name"', fingerprint="ab" * 32, num_blocks=4),
    adapter=AdapterSettings(lora_targets=("v_proj", "q_proj")),
)
HEAD = f'name = "tales"\nnonce = "{"0f" * 16}"\n'
MODEL = f'[model]\nname = "m"\nfingerprint = "{"ab" * 32}"\nnum_blocks = 4\n'


def load_text(tmp_path: Path, text: str) -> RunSpec:
    path = tmp_path / "swarm.toml"
    path.write_text(text)
    return load_config(path)


def test_what_is_written_is_read_back_equal(tmp_path: Path) -> None:
    write_config(SPEC, tmp_path / "swarm.toml")
    assert load_config(tmp_path) == SPEC
    assert load_config(tmp_path / "swarm.toml") == SPEC


def test_settings_survive_plain_tables() -> None:
    assert spec_from_tables(tables_of(SPEC)) == SPEC


def test_every_setting_is_written_with_a_comment() -> None:
    text = config_text(SPEC)
    tables = tomllib.loads(text)
    for section, kind in SECTIONS.items():
        assert set(tables[section]) == {item.name for item in fields(kind)}
    for line in text.splitlines():
        assert " = " not in line or "  # " in line


def test_writing_over_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "swarm.toml"
    path.write_text("mine")
    with pytest.raises(BadConfig, match="exists already"):
        write_config(SPEC, path)
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_only_the_model_is_required(tmp_path: Path) -> None:
    spec = load_text(tmp_path, HEAD + MODEL)
    assert spec.adapter == AdapterSettings()
    assert spec.adapter.auto_targets


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "model.name is missing"),
        (HEAD + MODEL + "[training]\nlearning_rat = 1", "training.learning_rate"),
        (HEAD + MODEL + "[trainin]\n", "nearest one is training"),
        (HEAD + "model = 3", r"\[model\]"),
        (HEAD + MODEL + "[training]\nbatch_size = 0", "training.batch_size is 0"),
        (HEAD + MODEL + "[training]\nbatch_size = 2.0", "whole number"),
        (HEAD + MODEL + "[training]\nbatch_size = true", "whole number"),
        (HEAD + MODEL + "[training]\nlearning_rate = nan", "training.learning_rate is nan"),
        (HEAD + MODEL + '[training]\nlearning_rate = "1"', "use a number"),
        (HEAD + MODEL + '[training]\nschedule = "cosin"', "constant, linear, cosine"),
        (HEAD + MODEL + "[training]\nwarmup_samples = 9\ntotal_samples = 8", "training.warmup_samples is 9"),
        (HEAD + MODEL + "[rounds]\nround_samples = 1", "rounds.round_samples is 1"),
        (HEAD + MODEL + "[adapter]\nlora_targets = []", "adapter.lora_targets"),
        (HEAD + MODEL + '[adapter]\nlora_targets = ["auto", "q"]', "mixes"),
        (HEAD + MODEL + "[adapter]\nlora_targets = [1]", "adapter.lora_targets holds 1"),
        (HEAD + MODEL + '[adapter]\nname = "a/b"', "adapter.name"),
        (HEAD + MODEL + '[wire]\ndtype = "fp16"', "bf16, 8bit, fp32"),
        (HEAD + '[model]\nname = ""\nfingerprint = "0"\nnum_blocks = 1', "model.name is ''"),
        (HEAD + MODEL.replace("ab" * 32, "xy"), "64 hex digits"),
        (MODEL, "name is missing"),
        ('name = "../x"\nnonce = "1"\n' + MODEL, "name is '../x'"),
        ("name = ", "not TOML"),
        ("name = " + "[" * 5000, "not TOML"),
        ("name = " + "9" * 5000, "not TOML"),
        (HEAD + MODEL + "[training]\nbatch_size = " + "9" * 400, "training.batch_size is 999"),
        (HEAD + MODEL + "[training]\nlearning_rate = " + "9" * 400, "training.learning_rate is 999"),
    ],
    ids=range(26),
)
def test_a_wrong_setting_is_named_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(BadConfig, match=words) as caught:
        load_text(tmp_path, text)
    assert "swarm.toml: " in str(caught.value) or "not TOML" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_saved_by_notepad_is_read(tmp_path: Path) -> None:
    text = HEAD + MODEL
    (tmp_path / "swarm.toml").write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
    assert load_config(tmp_path) == load_text(tmp_path, text)


def test_files_that_are_no_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="swarm init"):
        load_config(tmp_path)
    (tmp_path / "swarm.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(BadConfig, match="UTF-8"):
        load_config(tmp_path)
    (tmp_path / "swarm.toml").write_bytes(b"#" * 100_000)
    with pytest.raises(BadConfig, match="larger"):
        load_config(tmp_path)


def test_a_value_changed_in_code_is_checked_too() -> None:
    with pytest.raises(BadConfig, match="round_samples"):
        replace(SPEC, rounds=RoundSettings(round_samples=1))
    with pytest.raises(BadConfig, match=r"adapter\.lora_rank"):
        AdapterSettings(lora_rank=0)
    assert isinstance(TrainingSettings(learning_rate=1).learning_rate, float)
