"""The command line parses into options, answers --help at once, and prints errors in one line."""

import gc
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest
from click.testing import CliRunner, Result

from blocks.errors import UnknownModel
from blocks.spans import Span
from peers.errors import NoRoute
from peers.streams.wire_format import WireFormat
from swarm.cli.main import COMMANDS, main
from swarm.cli.report import plain_errors
from swarm.errors import BadData
from swarm.join_string import Join, RunDirectory, format_join
from swarm.options import (
    DemoOptions,
    ExportOptions,
    GenerateOptions,
    JoinOptions,
    Screen,
    ServeOptions,
    StatusOptions,
    TrainOptions,
)
from swarm.run import RunId
from swarm.state import IDENTITY_NAME

ADDRESS = "/ip4/127.0.0.1/tcp/31330/p2p/12D3KooWEhjTZkKK4DN2rbq2zMkLKrxjYPGGfXhQJ8KmWPzXHtXb"
BOB = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
JOIN = Join(run_id=RunId("ab" * 16), run_name="tales", peers=(ADDRESS,))
TEXT = format_join(JOIN)


class Commands(ModuleType):
    """Stands for swarm.commands and swarm.demo: keeps what it was asked to do, and fails if told to."""

    def __init__(self) -> None:
        super().__init__("swarm.commands")
        self.asked: list[object] = []
        self.error: BaseException | None = None
        for name in ("join", "train", "generate", "serve", "status", "export", "demo"):
            setattr(self, f"run_{name}", self.run)

    def run(self, options: object, screen: Screen) -> None:
        self.asked.append(options)
        if self.error is not None:
            raise self.error
        screen.say("said [bold]as it is")
        screen.result("the result")


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Commands:
    fake = Commands()
    monkeypatch.setitem(sys.modules, "swarm.commands", fake)
    monkeypatch.setitem(sys.modules, "swarm.demo", fake)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return fake


def call(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def asked_by(commands: Commands, *words: str) -> object:
    result = call(*words)
    assert result.exit_code == 0, result.output
    return commands.asked[-1]


def test_join_becomes_options(commands: Commands, tmp_path: Path) -> None:
    options = asked_by(
        commands,
        "join",
        TEXT,
        "--blocks",
        "0:15",
        "--port",
        "31330",
        "--announce",
        "/ip4/1.2.3.4/tcp/1",
        "--threads",
        "2",
    )
    assert options == JoinOptions(
        target=JOIN,
        state_root=tmp_path / "data" / "swarmtune",
        cache_dir=tmp_path / "cache" / "swarmtune",
        blocks=Span(0, 15),
        port=31330,
        announce=("/ip4/1.2.3.4/tcp/1",),
        threads=2,
    )


def test_defaults_leave_the_choice_to_the_peer(commands: Commands) -> None:
    options = asked_by(commands, "join", TEXT)
    assert isinstance(options, JoinOptions)
    assert (options.blocks, options.state, options.device, options.dtype, options.port) == (
        None,
        None,
        "auto",
        "auto",
        0,
    )


@pytest.mark.parametrize(
    "words", [("train", TEXT, "--data", "x.txt"), ("generate", TEXT, "Once")], ids=["train", "text"]
)
def test_how_activations_travel_is_the_runs_choice_unless_said(commands: Commands, words: tuple[str, ...]) -> None:
    chosen = [asked_by(commands, *words, *more) for more in ((), ("--wire", "8bit"), ("--wire", "fp32"))]
    assert [each.wire for each in chosen if isinstance(each, (TrainOptions, GenerateOptions))] == [
        None,
        WireFormat.EIGHT_BIT,
        WireFormat.FP32,
    ]
    assert "'4bit' is not one of 'bf16', '8bit', 'fp32'" in call(*words, "--wire", "4bit").output


def test_what_dead_peers_left_becomes_options(commands: Commands, tmp_path: Path) -> None:
    for name in ("ann", "bob"):
        (tmp_path / name).mkdir()
    two = (tmp_path / "ann", tmp_path / "bob")
    resumed = asked_by(commands, "join", TEXT, *(word for path in two for word in ("--resume", str(path))))
    assert isinstance(resumed, JoinOptions)
    assert (resumed.resume, resumed.keep_megabytes) == (two, 1024)
    kept = asked_by(commands, "join", TEXT, "--keep-mb", "0")
    assert isinstance(kept, JoinOptions)
    assert (kept.resume, kept.keep_megabytes) == ((), 0)
    exported = asked_by(commands, "export", TEXT, "out", *(word for path in two for word in ("--from", str(path))))
    assert isinstance(exported, ExportOptions)
    assert exported.left == two
    assert "does not exist" in call("export", TEXT, "out", "--from", str(tmp_path / "cem")).output
    assert "does not exist" in call("join", TEXT, "--resume", str(tmp_path / "cem")).output


def test_a_run_directory_may_stand_for_join(commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "swarm.toml").write_text("")
    options = asked_by(commands, "join", f"{tmp_path}/")
    assert isinstance(options, JoinOptions)
    assert options.target == RunDirectory(path=tmp_path, join=None)


def test_train_becomes_options(commands: Commands) -> None:
    options = asked_by(commands, "train", TEXT, "--data", "a.jsonl", "--data", "b.txt", "--steps", "5", "--avoid", BOB)
    assert isinstance(options, TrainOptions)
    assert options.data == (Path("a.jsonl"), Path("b.txt"))
    assert (options.steps, options.avoid, options.only) == (5, frozenset({BOB}), frozenset())


def test_metrics_go_where_a_person_says(commands: Commands) -> None:
    options = asked_by(commands, "train", TEXT, "--data", "a.jsonl", "--track", "tensorboard", "--track", "trackio")
    assert isinstance(options, TrainOptions)
    assert options.track == ("tensorboard", "trackio")
    joined = asked_by(commands, "join", TEXT, "--track", "wandb")
    assert isinstance(joined, JoinOptions)
    assert joined.track == ("wandb",)


def test_the_best_adapter_is_asked_for(commands: Commands) -> None:
    options = asked_by(commands, "export", TEXT, "out", "--best")
    assert isinstance(options, ExportOptions)
    assert options.best
    refused = CliRunner().invoke(main, ["export", TEXT, "out", "--best", "--from", "/"])
    assert refused.exit_code == 2
    assert "--best and --from do not go together" in refused.output


def test_the_first_blocks_are_kept_or_others_held_not_both(commands: Commands) -> None:
    options = asked_by(commands, "train", TEXT, "--data", "a.jsonl", "--keep-first", "4", "--only", BOB)
    assert isinstance(options, TrainOptions)
    assert (options.keep_first, options.blocks, options.only) == (4, None, frozenset({BOB}))
    result = call("train", TEXT, "--data", "a.jsonl", "--keep-first", "4", "--blocks", "0:9")
    assert result.exit_code == 2
    assert "give one of them" in result.output


def test_labels_are_of_held_out_rows(commands: Commands) -> None:
    result = call("train", TEXT, "--data", "a.jsonl", "--label", "good")
    assert result.exit_code == 2
    assert "--label names labels of --eval-data; give that, too" in result.output
    options = asked_by(
        commands, "train", TEXT, "--data", "a.jsonl", "--eval-data", "b", "--label", "x y", "--label", "z"
    )
    assert isinstance(options, TrainOptions)
    assert options.labels == ("x y", "z")


def test_generate_becomes_options(commands: Commands) -> None:
    options = asked_by(commands, "generate", TEXT, "Hello", "--temperature", "0.5", "--no-adapter", "--raw")
    assert isinstance(options, GenerateOptions)
    assert (options.prompt, options.temperature, options.adapter, options.chat) == ("Hello", 0.5, False, False)
    assert (options.lookup, options.draft) == (True, None)
    options = asked_by(commands, "generate", TEXT, "Hello", "--speculate", "off", "--draft", "small")
    assert isinstance(options, GenerateOptions)
    assert (options.lookup, options.draft) == (False, "small")
    for words, adapter in (((), True), (("--adapter", "pirate"), "pirate"), (("--no-adapter",), False)):
        options = asked_by(commands, "generate", TEXT, "Hello", *words)
        assert isinstance(options, GenerateOptions)
        assert options.adapter == adapter
    assert "do not go together" in call("generate", TEXT, "Hello", "--adapter", "pirate", "--no-adapter").output


def test_serve_takes_several_runs(commands: Commands, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text("")
    other = Join(run_id=RunId("cd" * 16), run_name="news", peers=(ADDRESS,))
    words = ("--port", "9000", "--host", "0.0.0.0", "--api-keys", str(keys), "--speculate", "off", "--texts", "3")
    options = asked_by(commands, "serve", TEXT, format_join(other), *words)
    assert options == ServeOptions(
        target=JOIN,
        others=(other,),
        state_root=tmp_path / "data" / "swarmtune",
        cache_dir=tmp_path / "cache" / "swarmtune",
        host="0.0.0.0",
        port=9000,
        keys=keys,
        texts=3,
        lookup=False,
    )
    alone = asked_by(commands, "serve", TEXT)
    assert isinstance(alone, ServeOptions)
    assert (alone.others, alone.host, alone.port, alone.keys) == ((), "127.0.0.1", 8000, None)


def test_status_export_and_demo_become_options(commands: Commands, tmp_path: Path) -> None:
    status = asked_by(commands, "status", TEXT, "--json", "--peer", ADDRESS)
    assert isinstance(status, StatusOptions)
    assert (status.json, status.peers) == (True, (ADDRESS,))
    export = asked_by(commands, "export", TEXT, "out")
    assert isinstance(export, ExportOptions)
    assert export.directory == Path("out")
    assert asked_by(commands, "demo", "--json", "d.json") == DemoOptions(
        cache_dir=tmp_path / "cache" / "swarmtune", num_peers=4, json_file=Path("d.json")
    )


def test_results_go_to_stdout_and_words_to_stderr(commands: Commands) -> None:
    result = call("status", TEXT)
    assert result.stdout == "the result\n"
    assert result.stderr == "said [bold]as it is\n"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("join", TEXT[:-5]), "cut off"),
        (("join", "nowhere"), "swarm init"),
        (("join", TEXT, "--blocks", "5"), "not a span"),
        (("join", TEXT, "--peer", "10.0.0.1"), "not a peer's address"),
        (("train", TEXT), "--data"),
        (("train", TEXT, "--data", "a", "--only", "p", "--avoid", "p"), "both"),
        (("generate", TEXT, "x", "--top-p", "0"), "--top-p"),
        (("serve",), "JOIN"),
        (("serve", TEXT, "nowhere"), "swarm init"),
        (("serve", TEXT, "--api-keys", "no-such-file"), "does not exist"),
        (("id", TEXT, "--state", "a"), "not both"),
        (("nonsense",), "No such command"),
        (("jion", TEXT), "did you mean 'join'?"),
    ],
)
def test_bad_arguments_are_one_error_line(commands: Commands, words: tuple[str, ...], error: str) -> None:
    result = call(*words)
    assert result.exit_code in (1, 2)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert error in last
    assert not commands.asked


def test_errors_out_of_task_groups_are_one_line(commands: Commands) -> None:
    commands.error = ExceptionGroup(
        "tasks", [NoRoute("no host\nfor block 3"), ExceptionGroup("", [BadData("bad row")])]
    )
    result = call("train", TEXT, "--data", "a.jsonl")
    assert result.exit_code == 1
    assert result.stderr == "Error: no host for block 3; bad row\n"


def test_a_bug_keeps_its_traceback(commands: Commands) -> None:
    commands.error = ZeroDivisionError("slip")
    assert isinstance(call("status", TEXT).exception, ZeroDivisionError)


def test_a_bug_beside_an_expected_error_is_not_hidden() -> None:
    with pytest.raises(ExceptionGroup) as caught, plain_errors():
        raise ExceptionGroup("tasks", [BadData("x"), ZeroDivisionError()])
    assert caught.group_contains(ZeroDivisionError)


def test_one_expected_error_alone_is_one_line() -> None:
    with pytest.raises(click.ClickException, match="no such model"), plain_errors():
        raise UnknownModel("no such model")


def test_a_command_that_hosts_and_fails_leaves_garbage_to_be_collected(commands: Commands) -> None:
    commands.error = UnknownModel("no such model")
    assert gc.isenabled()
    assert call("join", TEXT).exit_code == 1
    assert gc.isenabled(), "whoever called it, as a test does, would grow from now on"


def test_ctrl_c_says_what_was_done(commands: Commands) -> None:
    commands.error = KeyboardInterrupt()
    result = call("join", TEXT)
    assert result.exit_code == 130
    assert "state is kept" in result.stderr


def test_id_is_made_once_and_kept(commands: Commands, tmp_path: Path) -> None:
    first = call("id", TEXT)
    assert first.exit_code == 0, first.output
    assert call("id", TEXT).stdout == first.stdout
    path = tmp_path / "data" / "swarmtune" / JOIN.run_id / "peer-0"
    assert (path / IDENTITY_NAME).is_file()
    assert call("id", "--state", str(path)).stdout == first.stdout


def test_every_command_shows_an_example() -> None:
    for name in COMMANDS:
        result = call(name, "--help")
        assert result.exit_code == 0
        assert "Example" in result.output
        assert f"swarm {name}" in result.output


def test_the_list_of_commands_cuts_no_sentence() -> None:
    listed = call("--help").stdout.partition("Commands:")[2].strip().splitlines()
    assert len(listed) == len(COMMANDS)
    assert all(line.endswith(".") and not line.endswith("...") for line in listed), listed


def test_help_imports_nothing_heavy() -> None:
    """In a process of its own, since this one has torch already."""
    script = """
import json, sys
from swarm.cli.main import COMMANDS, main
for words in [["--help"]] + [[name, "--help"] for name in COMMANDS]:
    try:
        main(words)
    except SystemExit as end:
        assert end.code == 0
heavy = ["torch", "transformers", "hivemind", "peft", "numpy", "fastapi", "uvicorn", "pydantic"]
print(json.dumps([name for name in heavy if name in sys.modules]))
"""
    # Nine helps in one process; with torch it would take several seconds for the import alone.
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []
