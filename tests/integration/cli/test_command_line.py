"""From nothing to an adapter by the commands that a person types; the hosts are processes of their own."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from swarm.join_string import Join, format_join, parse_join
from swarm.run import RunId
from tests.integration.cli.conftest import SECONDS, Home, Process, done, error_of, swarm
from tests.integration.swarm.small_swarm import until

TOTAL = 16  # samples of the run
ROWS = [" ".join(f"w{3 + (start + step) % 120}" for step in range(24)) for start in range(40)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    run: Path
    first: Process
    second: Process
    join: str


@pytest.fixture(scope="module")
def running(home: Home) -> Running:
    """`swarm init`, the first host from the run's directory, the second by the first one's join string."""
    run = home.init(
        "tales",
        lora_rank="4",
        batch_size="4",
        sequence_length="32",
        round_samples="8",
        compute_dtype="fp32",
        total_samples=str(TOTAL),
    )
    first = home.start("join", f"{run}/", "--blocks", "0:3", "--host", "127.0.0.1", "--threads", "1")
    join = first.line()
    second = home.start(
        *("join", join, "--blocks", "3:6", "--host", "127.0.0.1", "--threads", "1", "--nickname", "bea")
    )
    second.line()
    return Running(run=run, first=first, second=second, join=join)


@pytest.fixture(scope="module")
def data(home: Home) -> Path:
    path = home.path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS[:32]))
    return path


def test_a_join_string_names_the_run_and_a_peer(running: Running) -> None:
    join = parse_join(running.join)
    assert isinstance(join, Join)
    assert join.run_name == "tales"
    assert join.peers[0].startswith("/ip4/127.0.0.1/tcp/")
    assert "holds blocks 0:3 of tales" in running.first.errors()


def test_status_shows_who_holds_what(running: Running) -> None:
    found = json.loads(done(swarm("status", running.join, "--json")).stdout)
    assert found["missing_blocks"] == []
    assert sorted(host["blocks"] for host in found["hosts"]) == [[0, 3], [3, 6]]
    assert set(found["traffic"]) == {host["peer"] for host in found["hosts"]}
    assert all(counts["sent"] > 0 < counts["received"] for counts in found["traffic"].values())
    table = done(swarm("status", f"{running.run}/")).stdout
    assert "tales: round 0, 2 hosts" in table
    assert "received" in table
    assert "bea" in table


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21 reads it
def test_train_generate_export(running: Running, data: Path, home: Home) -> None:
    held_out = home.path / "held_out.txt"
    held_out.write_text("\n".join(ROWS[32:]))
    trainer = home.start(
        *("train", running.join, "--data", str(data), "--eval-data", str(held_out), "--steps", "3", "--threads", "1")
    )
    assert trainer.popen.wait(SECONDS) == 0, trainer.errors()
    said = trainer.errors()
    assert "training on 32 samples" in said
    assert "3 steps, " in said
    assert "held-out loss" in said

    def averaged() -> bool:
        return json.loads(done(swarm("status", running.join, "--json")).stdout)["round"] >= 1

    until(averaged, "a round after eight samples")

    # The run's directory serves as JOIN too, for whoever owns the run.
    prompt = ROWS[0].split()[:4]
    text = done(swarm("generate", f"{running.run}/", " ".join(prompt), "--max-tokens", "4", "--threads", "1")).stdout
    assert text.strip()

    def given() -> bool:
        hosts = json.loads(done(swarm("status", running.join, "--json")).stdout)["hosts"]
        return all(host["trained_tokens"] > 0 < host["served_tokens"] for host in hosts)

    until(given, "both hosts say what they have trained and served")
    _, _, below = done(swarm("status", running.join)).stdout.partition("since each peer's first start")
    assert "bea" in below.partition("bytes since")[0]

    adapter = home.path / "adapter"
    assert "PeftModel.from_pretrained" in done(swarm("export", running.join, str(adapter))).stderr
    base = AutoModelForCausalLM.from_pretrained(home.model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter)
    trained = [value for name, value in model.named_parameters() if "lora_B" in name]
    assert len(trained) >= 6
    assert any(value.abs().max() > 0 for value in trained), "three steps changed nothing"


def test_a_trainer_that_was_stopped_is_gone_and_what_is_there_is_not_brought_again(
    running: Running, data: Path, home: Home
) -> None:
    def trainers() -> list[dict[str, int]]:
        return json.loads(done(swarm("status", running.join, "--json")).stdout)["trainers"]

    assert trainers() == [], "the one that came to its end has said so"
    trainer = home.start("train", running.join, "--data", str(data), "--steps", "100000", "--threads", "1")
    until(lambda: any(4 * each["step"] >= TOTAL for each in trainers()), "its steps are told", seconds=SECONDS)
    assert trainer.send(signal.SIGTERM) == 128 + signal.SIGTERM, trainer.errors()
    assert "goes on where the data stood" in trainer.errors()
    assert trainers() == [], "a trainer that was stopped is still announced"
    again = done(swarm("train", running.join, "--data", str(data), "--threads", "1"))
    assert f"nothing is missing to the run's {TOTAL} samples" in again.stderr
    assert "last loss" not in again.stderr


def test_id_names_the_peer_that_the_others_see(running: Running) -> None:
    mine = done(swarm("id", f"{running.run}/")).stdout.strip()
    assert parse_join(running.join).peers[0].endswith(f"/p2p/{mine}")


def test_a_state_directory_in_use_is_refused(running: Running) -> None:
    taken = str(running.run / "peer")
    assert "is in use by another process" in error_of(swarm("join", running.join, "--state", taken))


def test_a_used_port_is_refused(running: Running) -> None:
    port = parse_join(running.join).peers[0].split("/")[4]
    error = error_of(swarm("join", running.join, "--host", "127.0.0.1", "--port", port, "--blocks", "0:3"))
    assert f"port {port}" in error
    assert "choose another --port" in error


def test_a_copied_identity_is_refused(running: Running, home: Home) -> None:
    copy = home.path / "copy"
    copy.mkdir()
    (copy / "identity").write_bytes((running.run / "peer" / "identity").read_bytes())
    (copy / "identity").chmod(0o600)
    error = error_of(swarm("join", running.join, "--state", str(copy), "--host", "127.0.0.1", "--blocks", "0:3"))
    assert "is in use by another peer of this swarm" in error


def test_a_join_string_of_another_run_is_refused(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarm.node._FIND_RUN_SECONDS", 1.0)
    join = parse_join(running.join)
    other = format_join(Join(run_id=RunId("ab" * 16), run_name="other", peers=join.peers))
    error = error_of(swarm("status", other))
    assert "do not know run abab" in error
    assert "ask its owner for a new one" in error


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.jsonl", "", "has no rows"),
        ("rows.jsonl", '{"text": "w3 w4"}\n{"txt": "w5"}\n', "rows.jsonl:2"),
        ("torn.jsonl", '{"text": "w3 w4"\n', "torn.jsonl:1"),
        ("table.csv", "a,b\n", ".jsonl"),
        ("", "", "cannot be read"),
    ],
)
def test_data_that_cannot_be_used_is_refused(running: Running, home: Home, name: str, content: str, words: str) -> None:
    path = home.path / (name or "absent.txt")
    if name:
        path.write_text(content)
    assert words in error_of(swarm("train", running.join, "--data", str(path)))


def test_blocks_out_of_range_are_refused(running: Running) -> None:
    error = error_of(swarm("join", running.join, "--blocks", "4:9", "--host", "127.0.0.1"))
    assert "span 4:9 ends after the 6 blocks" in error


def checkpoints(home: Home) -> dict[Path, int]:
    """When each state directory's newest checkpoint was written."""
    found = [path for path in home.path.rglob("round-*.safetensors") if path.parent.name == "checkpoints"]
    return {path.parent: max(one.stat().st_mtime_ns for one in found if one.parent == path.parent) for path in found}


def test_ctrl_c_and_sigterm_leave_in_order(running: Running, home: Home) -> None:
    """The last test: it ends the hosts. Ctrl-C goes to the whole process group, as from a terminal."""
    before = checkpoints(home)
    daemons = running.first.children() + running.second.children()
    assert len(daemons) == 2
    assert running.second.send(signal.SIGINT, group=True) == 128 + signal.SIGINT, running.second.errors()
    found = json.loads(done(swarm("status", running.join, "--json")).stdout)
    assert found["missing_blocks"] == [3, 4, 5], "a host that left is still announced"

    waiting = swarm("generate", running.join, "w3", "--wait", "5", "--threads", "1")
    assert "waiting, at most" in waiting.stderr, "nobody was told what is waited for"
    assert "3:6" in error_of(waiting)

    assert running.first.send(signal.SIGTERM) == 128 + signal.SIGTERM, running.first.errors()
    for process in (running.first, running.second):
        assert "state is kept" in process.errors()
        assert "Traceback" not in process.errors()
    assert len(checkpoints(home)) == 2
    assert all(when > before.get(state, 0) for state, when in checkpoints(home).items()), "no checkpoint was written"
    assert not [pid for pid in daemons if Path(f"/proc/{pid}").exists()], "p2pd was left behind"

    # Nobody is left, and their directories are enough.
    left = [word for state in checkpoints(home) for word in ("--from", str(state.parent))]
    assert "the adapter of round" in done(swarm("export", running.join, str(home.path / "left"), *left)).stderr
    assert (home.path / "left" / "adapter_model.safetensors").is_file()
