"""Each finding says what is and, unless all is well, what to do."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement

from blocks.spans import Span
from peers.errors import NetworkFailed
from peers.network import PeerId
from swarm import doctor
from swarm.being_dialled import Attempt
from swarm.cli.main import main
from swarm.doctor import (
    Finding,
    Place,
    Verdict,
    by_distance,
    check_directory,
    check_memory,
    check_p2pd,
    check_port,
    check_run,
    judge_addresses,
    judge_attempts,
    judge_hosts,
    judge_packages,
    judge_python,
)
from tests.fakes import peer_record


def test_an_old_python_is_bad() -> None:
    assert judge_python((3, 10)).verdict is Verdict.BAD
    assert "3.11" in judge_python((3, 10)).remedy
    assert judge_python((3, 12)).verdict is Verdict.OK


def test_packages_that_are_missing_or_of_another_version_are_named() -> None:
    wanted = [Requirement(words) for words in ("numpy<2.4", "torch>=2.9", "gone", "extra-only; extra == 'dev'")]
    here = {"numpy": "2.4.1", "torch": "2.13.0+cpu"}
    found = list(judge_packages(wanted, here.get))
    assert [(each.verdict, each.words) for each in found] == [
        (Verdict.BAD, "numpy 2.4.1, <2.4 is needed"),
        (Verdict.BAD, "gone is not installed, any is needed"),
    ]
    assert found[0].remedy == "pip install 'numpy<2.4'"
    (fine,) = judge_packages(wanted[1:2], here.get)
    assert fine.verdict is Verdict.OK


def test_a_port_in_use_is_bad() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        found = check_port("127.0.0.1", taken.getsockname()[1])
    assert found.verdict is Verdict.BAD
    assert "--port" in found.remedy
    assert check_port("127.0.0.1", 0).verdict is Verdict.OK


async def test_p2pd_starts_here() -> None:
    assert (await check_p2pd()).verdict is Verdict.OK


def test_a_directory_that_cannot_be_written_is_bad_and_a_full_one_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_directory(tmp_path / "new" / "one").words.startswith(str(tmp_path / "new" / "one"))
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    monkeypatch.setattr(doctor, "LOW_DISK_BYTES", 1 << 60)
    assert check_directory(tmp_path).verdict is Verdict.LOOK
    file = tmp_path / "file"
    file.touch()
    assert check_directory(file).verdict is Verdict.BAD


def test_little_memory_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_available_bytes", lambda: 3 << 30)
    assert check_memory().verdict is Verdict.OK
    monkeypatch.setattr(doctor, "_available_bytes", lambda: 1 << 30)
    assert "--max-memory" in check_memory().remedy


@pytest.mark.parametrize(
    ("addresses", "verdict"),
    [(["10.0.0.5", "9.9.9.9"], Verdict.OK), (["192.168.1.2", "100.64.0.1"], Verdict.LOOK), ([], Verdict.LOOK)],
)
def test_who_has_only_private_addresses_is_told_of_forwarding(addresses: list[str], verdict: Verdict) -> None:
    found = judge_addresses(addresses)
    assert found.verdict is verdict
    assert ("--announce" in found.remedy) == (verdict is not Verdict.OK)


def test_hosts_that_do_not_answer_are_named() -> None:
    ann, bob = PeerId("ann"), PeerId("bob")
    assert judge_hosts([ann, bob], [bob, ann]).verdict is Verdict.OK
    some = judge_hosts([ann, bob], [bob])
    assert (some.verdict, some.words) == (Verdict.LOOK, "1 of 2 hosts answer")
    assert some.remedy.startswith("ann does not")
    assert judge_hosts([ann], []).verdict is Verdict.BAD
    assert judge_hosts([], []).verdict is Verdict.LOOK


def attempt(address: str | None = None, **changes: object) -> Attempt:
    return Attempt(peer=PeerId("ann"), port=31330, address=address, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("attempts", "verdict", "words", "remedy"),
    [
        ([], Verdict.LOOK, "nobody could be asked", "--peer"),
        ([attempt(why="busy")], Verdict.LOOK, "nobody could try: ann says: busy", "again in a minute"),
        ([attempt("127.0.0.1", reached=True)], Verdict.LOOK, "127.0.0.1 port 31330", "on this machine itself"),
        ([attempt("10.0.0.5", reached=True)], Verdict.OK, "can dial this machine at 10.0.0.5", "on this network"),
        ([attempt("9.9.9.9", reached=True)], Verdict.OK, "can dial this machine at 9.9.9.9 port 31330", ""),
        ([attempt("9.9.9.9")], Verdict.LOOK, "cannot dial it at port 31330", "forward TCP port 31330"),
        # Who is near says nothing of those far off, and one that can is enough.
        ([attempt("10.0.0.5", reached=True), attempt("9.9.9.9")], Verdict.LOOK, "sees this machine at 9.9.9.9", ""),
        ([attempt("9.9.9.9"), attempt("9.9.9.9", reached=True)], Verdict.OK, "9.9.9.9 port 31330", ""),
        ([attempt("127.0.0.1", reached=True), attempt("10.0.0.5")], Verdict.LOOK, "10.0.0.5, and cannot", "forward"),
    ],
)
def test_what_others_say_who_were_asked_to_dial_this_machine(
    attempts: list[Attempt], verdict: Verdict, words: str, remedy: str
) -> None:
    found = judge_attempts(attempts)
    assert found.verdict is verdict
    assert words in found.words
    assert remedy in found.remedy


def test_who_lives_on_the_internet_is_asked_first_and_who_does_not_answer_never() -> None:
    addresses = {
        "near": ("/ip4/10.0.0.5/tcp/1",),
        "hidden": (),
        "relayed": ("/ip4/9.9.9.8/tcp/1/p2p/relay/p2p-circuit",),
        "far": ("/dns4/a.example/tcp/1", "/ip4/9.9.9.9/tcp/1"),
    }
    records = [replace(peer_record(name, Span(0, 2)), addresses=found) for name, found in addresses.items()]
    assert by_distance(records, [*addresses]) == ["far", "near", "hidden", "relayed"]
    assert by_distance(records, ["hidden"]) == ["hidden"]


def test_a_run_that_cannot_be_entered_is_bad_and_says_why() -> None:
    def enter() -> object:
        raise NetworkFailed("no bootstrap peer answered")

    (found,) = check_run(enter, Place(host="127.0.0.1", port=0, directories=()))  # type: ignore[arg-type]
    assert (found.verdict, found.words) == (Verdict.BAD, "no bootstrap peer answered")


@pytest.mark.parametrize(("verdict", "status"), [(Verdict.LOOK, 0), (Verdict.BAD, 1)])
def test_the_command_shows_what_was_found_and_fails_if_something_is_bad(
    verdict: Verdict, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = Finding(check="port", verdict=verdict, words="taken", remedy="another")
    examine: Callable[..., object] = lambda place, enter, ask_first: iter([finding])  # noqa: E731
    monkeypatch.setattr(doctor, "examine", examine)
    shown = CliRunner().invoke(main, ["doctor"])
    assert (shown.exit_code, "taken" in shown.stdout, "another" in shown.stdout) == (status, True, True)
    asked = CliRunner().invoke(main, ["doctor", "--json"])
    assert json.loads(asked.stdout) == {"findings": [finding.to_plain()]}
