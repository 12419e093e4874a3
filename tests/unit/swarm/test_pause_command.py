"""`swarm pause` and `swarm resume`, and what `swarm join` is told of limits, as typed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from swarm.hosts.hours import Hours, Stretch
from swarm.hosts.pause_file import PAUSE_NAME, mark_hosting
from swarm.options import JoinOptions
from swarm.run import RunId
from swarm.state import claim_state, lock_state
from tests.unit.swarm.test_cli import JOIN, TEXT, Commands, asked_by, call, commands

__all__ = ["commands"]  # a fixture

OTHER_RUN = RunId("cd" * 16)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data" / "swarmtune"


@pytest.fixture
def hosts(root: Path) -> Iterator[list[Path]]:
    """Two hosts of one run, one of another, and between them a peer that holds no blocks."""
    with ExitStack() as running:
        states = [running.enter_context(claim_state(root, run)).path for run in (JOIN.run_id,) * 3 + (OTHER_RUN,)]
        del states[1]
        for state in states:
            running.enter_context(mark_hosting(state))
        yield states


def paused(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.rglob(PAUSE_NAME))


def test_without_a_target_all_hosts_in_the_usual_place_are_paused_and_named(root: Path, hosts: list[Path]) -> None:
    result = call("pause")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [f"pausing the peer in {state}" for state in sorted(hosts)]
    assert paused(root) == sorted(hosts)
    result = call("resume")
    assert result.stdout.splitlines() == [f"resuming the peer in {state}" for state in sorted(hosts)]
    assert not paused(root)


def test_a_join_string_means_the_hosts_of_its_run(root: Path, hosts: list[Path]) -> None:
    assert call("pause", TEXT).exit_code == 0
    assert paused(root) == hosts[:2]
    assert call("resume", TEXT).exit_code == 0
    assert not paused(root)


def test_a_state_directory_means_its_peer(root: Path, hosts: list[Path]) -> None:
    assert call("pause", str(hosts[1])).stdout == f"pausing the peer in {hosts[1]}\n"
    assert paused(root) == [hosts[1]]


def test_a_state_directory_chosen_by_hand_is_found_too(root: Path, tmp_path: Path) -> None:
    with lock_state(tmp_path / "mine") as state, mark_hosting(state.path):
        assert call("pause", str(tmp_path / "mine")).exit_code == 0
        assert (tmp_path / "mine" / PAUSE_NAME).is_file()


def test_a_run_directory_means_its_own_peer_and_those_of_its_run(
    root: Path, tmp_path: Path, hosts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "tales"
    run.mkdir()
    (run / "swarm.toml").write_text("")
    (run / "join.txt").write_text(TEXT)
    with lock_state(run / "peer") as own, mark_hosting(own.path):
        assert call("pause", f"{run}/").exit_code == 0
        assert (run / "peer" / PAUSE_NAME).is_file()
        assert paused(root) == hosts[:2]


@pytest.mark.parametrize("word", ["pause", "resume"])
def test_where_no_peer_runs_is_one_line(root: Path, word: str) -> None:
    for words in ([], [TEXT]):
        result = call(word, *words)
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: no peer that holds blocks runs")
        assert len(result.stderr.splitlines()) == 1
    with claim_state(root, JOIN.run_id) as client:
        assert "no peer that holds blocks runs here" in call(word, str(client.path)).stderr
        assert not paused(root)
    assert call(word, "nowhere").exit_code == 1


def test_a_peer_that_ended_while_it_was_paused_is_resumed_for_its_next_start(root: Path, hosts: list[Path]) -> None:
    client = claim_state(root, JOIN.run_id)
    (client.path / PAUSE_NAME).write_text('{"paused": true}')
    client.close()
    assert f"no longer paused when started: {client.path}" in call("resume", TEXT).stdout
    assert not paused(root)


def test_limits_become_options(commands: Commands) -> None:
    plain = asked_by(commands, "join", TEXT)
    assert isinstance(plain, JoinOptions)
    assert (plain.max_memory_bytes, plain.max_send, plain.hours) == (None, math.inf, None)
    limits = ("--hours", "22-07", "--max-memory", "4GB", "--max-bandwidth", "20Mbit")
    limited = asked_by(commands, "join", TEXT, *limits)
    assert isinstance(limited, JoinOptions)
    assert (limited.max_memory_bytes, limited.max_send) == (4 * 10**9, 2.5e6)
    assert limited.hours == Hours((Stretch(22 * 60, 7 * 60),))


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--hours", "25-07", "no time of day"),
        ("--hours", "07-07", "ends when it begins"),
        ("--max-memory", "0GB", "more than nothing"),
        ("--max-memory", "-4GB", "a number and a unit"),
        ("--max-bandwidth", "0Mbit", "64kbit or more"),
        ("--max-bandwidth", "-1MB/s", "a number and a unit"),
    ],
)
def test_limits_that_mean_nothing_are_refused_in_one_line(
    commands: Commands, option: str, value: str, words: str
) -> None:
    result = call("join", TEXT, option, value)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {option} ")
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not commands.asked
