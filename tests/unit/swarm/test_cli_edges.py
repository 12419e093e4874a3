"""What a newcomer types wrong, or cannot know: named in one line, before anything is entered."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from swarm.cli.main import main
from swarm.cli.stopping import Stopped, stop_on_signals
from swarm.gateway.serve import listen
from swarm.lan.discovery import read_peers_file
from tests.unit.errors_made.entering import ADDRESS, LINE, new_run

BOB = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"


@pytest.fixture
def handlers() -> Iterator[None]:
    """Of this process, as in a terminal's: Lightning ignores Ctrl-C from a failed fit on. Put back afterwards."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before, hook = [signal.getsignal(number) for number in numbers], sys.unraisablehook
    for number in numbers:
        signal.signal(number, signal.default_int_handler)
    yield
    sys.unraisablehook = hook
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def call(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


@pytest.mark.parametrize(
    "words",
    [
        ("status", LINE, "--watch", "nan"),
        ("status", LINE, "--watch", "inf"),
        ("train", LINE, "--data", "a.txt", "--wait", "nan"),
        ("generate", LINE, "x", "--temperature", "nan"),
        ("generate", LINE, "x", "--top-p", "nan"),
        ("invite", ".", "--anyone", "--days", "nan"),
        ("invite", ".", "--anyone", "--days", "1e300"),
    ],
)
def test_what_is_no_number_is_refused_by_its_option(words: tuple[str, ...]) -> None:
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert f"Error: Invalid value for '{words[-2]}': " in result.stderr


@pytest.mark.parametrize("option", ["--only", "--avoid"])
def test_a_peer_that_cannot_be_is_refused_rather_than_waited_for(option: str) -> None:
    result = call("train", LINE, "--data", "a.txt", option, BOB, option, "bob")
    assert result.exit_code == 2, result.output
    assert f"Error: {option} has 'bob'; use a peer id, as `swarm status` shows them" in result.stderr


@pytest.mark.parametrize(("command", "name"), [("generate", "PROMPT"), ("export", "DIRECTORY")])
def test_with_a_group_on_this_network_the_one_word_is_not_the_run(
    command: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        "swarm.cli.arguments._target", lambda join, lan, *more: asked.append((join, lan)) or ("run", ())
    )
    monkeypatch.setattr(f"swarm.commands.run_{command}", lambda options, screen: asked.append(options))
    assert call(command, "--lan", "tales", "a word").exit_code == 0
    assert call(command, "tales/", "a word").exit_code == 0
    one, group, other, run = asked[0], asked[1], asked[2], asked[3]
    assert (one, other) == ((None, "tales"), ("tales/", None))
    for options in (group, run):
        assert str(options.prompt if command == "generate" else options.directory) == "a word"
    for words in ((command,), (command, "tales/"), (command, "--lan", "tales")):
        result = call(*words)
        assert result.exit_code == 2
        assert f"Error: Missing argument '{name}'." in result.stderr


def test_revoking_asks_for_the_run_and_no_more_than_it_can_use(tmp_path: Path) -> None:
    words = call("revoke", "--help").output
    assert "RUN WHO" in words
    assert "--peer" in words
    assert not any(option in words for option in ("[JOIN]", "--lan", "--threads", "--state"))
    result = call("revoke", str(new_run(tmp_path / "open")), BOB)
    assert result.exit_code == 1
    assert "is not private" in result.stderr
    assert "Invalid value for 'RUN'" in call("revoke", LINE, BOB).stderr


@pytest.mark.parametrize("words", [("--host", "localhost"), ("--announce", "203.0.113.7")])
def test_the_doctor_says_which_words_no_peer_could_start_with(words: tuple[str, str]) -> None:
    result = call("doctor", *words)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(f"Error: network.{words[0][2:]} ")


def test_an_address_that_is_taken_is_said_once() -> None:
    with listen("127.0.0.1", 0) as held, pytest.raises(Exception, match=r"\(Address already in use\); choose others"):
        listen("127.0.0.1", held.getsockname()[1])


def test_a_list_of_peers_saved_by_notepad_is_read(tmp_path: Path) -> None:
    (tmp_path / "peers.txt").write_bytes(f"{ADDRESS}\r\n".encode("utf-8-sig"))
    assert read_peers_file(tmp_path / "peers.txt") == (ADDRESS,)


class Dying:
    """Whose destruction a signal interrupts."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_that_python_drops_comes_again(handlers: None) -> None:
    stop_on_signals()
    Dying()
    with pytest.raises(Stopped) as caught:
        threading.Event().wait(30)
    assert caught.value.exit_code == 143


def test_a_signal_before_the_command_itself_has_its_exit_code_too(
    handlers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.import_module", lambda name: signal.raise_signal(signal.SIGINT))
    result = call("status", "tales/")
    assert (result.exit_code, result.stderr) == (130, "stopped\n")
