"""A run found by its name on this network, by mDNS or by asking a named peer; nothing is copied between machines.

On loopback: mDNS asks only the network that a peer listens on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from swarm.cli import arguments
from swarm.join_string import Join, parse_join
from swarm.lan.discovery import LanPresence, find_run, search
from swarm.lan.records import BadLan, LanPeer
from swarm.run import RunId
from tests.integration.cli.conftest import Home, Process, done, error_of, swarm
from tests.integration.swarm.small_swarm import until

GROUP = f"lab-{os.getpid()}"  # another run of these tests on this machine hears what this one says
HERE = ("--host", "127.0.0.1", "--threads", "1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Lab:
    run: Path
    first: Process
    join: Join


@pytest.fixture(scope="module")
def lab(home: Home) -> Lab:
    run = home.init("tales", lora_rank="4", batch_size="4", sequence_length="32", round_samples="8")
    first = home.start("join", f"{run}/", "--lan", GROUP, "--blocks", "0:3", *HERE)
    found = parse_join(first.line())
    return Lab(run=run, first=first, join=found)


def named(group: str, digit: str, *, who: str) -> LanPeer:
    """A peer of the run whose id is one digit again and again."""
    return LanPeer(group=group, run=RunId(digit * 32), run_name="other", addresses=(f"/ip4/127.0.0.1/tcp/9/p2p/{who}",))


@pytest.fixture
def stranger() -> Iterator[LanPeer]:
    """Who says the same name for a run of its own."""
    peer = named(f"{GROUP}-b", "f", who="12D3KooWStranger1111111")
    presence = LanPresence(peer, host="127.0.0.1")
    yield peer
    presence.close()


def test_a_second_host_joins_by_the_name_alone(lab: Lab, home: Home) -> None:
    second = home.start("join", "--lan", GROUP, "--blocks", "3:6", "--nickname", "bea", *HERE)
    assert parse_join(second.line()).run_id == lab.join.run_id
    assert f"looking for '{GROUP}'" in second.errors()

    def all_held() -> bool:
        found = json.loads(done(swarm("status", f"{lab.run}/", "--json")).stdout)
        return found["missing_blocks"] == [] and len(found["hosts"]) == 2

    until(all_held, "both halves are held")
    until(lambda: len(search(GROUP, host="127.0.0.1")) == 2, "both are found by their name")


def test_where_multicast_is_blocked_a_named_peer_is_asked(
    lab: Lab, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "ANY_HOST", "127.0.0.1")  # no multicast leaves this machine
    file = tmp_path / "peers.txt"
    file.write_text(f"# the lab's machines\n/ip4/127.0.0.1/tcp/9/p2p/12D3KooWGone1111111111\n{lab.join.peers[0]}\n")
    # No multicast passes here: nobody has this name by mDNS, as each network is asked for itself.
    peers = file.read_text().split()[-1:]
    assert find_run(GROUP, peers, host="127.0.0.2").run_id == lab.join.run_id
    found = done(swarm("status", f"lan:{GROUP}", "--peers-file", str(file), "--json"))
    assert json.loads(found.stdout)["run"] == lab.join.run_id


def test_a_name_that_nobody_has_says_what_to_do(home: Home) -> None:
    assert f"nobody on this network answers for '{GROUP}-x'" in error_of(swarm("join", "--lan", f"{GROUP}-x", *HERE))
    assert "cannot name a group" in error_of(swarm("join", "--lan", "no where", *HERE))


def test_without_a_name_or_a_join_string_the_command_says_what_is_missing() -> None:
    result = swarm("status")
    assert result.exit_code == 2
    assert "--lan NAME" in result.stderr


def test_a_stranger_with_the_same_name_is_not_joined_by_mistake(stranger: LanPeer) -> None:
    presence = LanPresence(named(f"{GROUP}-b", "e", who="12D3KooWTwin22222222222"), host="127.0.0.1")
    try:
        until(lambda: len(search(f"{GROUP}-b", host="127.0.0.1")) == 2, "both are there")
        with pytest.raises(BadLan, match="2 runs on this network"):
            find_run(f"{GROUP}-b", host="127.0.0.1")
    finally:
        presence.close()


def test_who_has_left_is_not_found_any_more(home: Home) -> None:
    peer = named(f"{GROUP}-c", "d", who="12D3KooWBrief33333333333")
    presence = LanPresence(peer, host="127.0.0.1")
    until(lambda: search(f"{GROUP}-c", host="127.0.0.1") == [peer], "it is there")
    presence.close()
    assert search(f"{GROUP}-c", host="127.0.0.1", seconds=1.5) == []
