"""What `swarm serve` makes of its words: an invitation to a private run, and a run that is found on this network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from peers.identity import load_or_create
from peers.private.membership import Role
from swarm import commands
from swarm.cli.main import main
from swarm.join_string import Join, RunDirectory, save_join
from swarm.lan import discovery as lan
from swarm.new_run import create_run
from swarm.options import ServeOptions
from swarm.peer import Peer
from swarm.peer_config import PeerConfig
from swarm.private.inviting import invite
from swarm.run import RunId

ADDRESS = "/ip4/192.168.1.5/tcp/31330/p2p/12D3KooWEhjTZkKK4DN2rbq2zMkLKrxjYPGGfXhQJ8KmWPzXHtXb"
NEAR = Join(run_id=RunId("ab" * 16), run_name="tales", peers=(ADDRESS,))


class Enough(Exception):
    """What was to be seen was seen."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Join | RunDirectory, PeerConfig]]:
    """What peers were entered with, instead of entering."""
    found: list[tuple[Join | RunDirectory, PeerConfig]] = []

    def enter(target: Join | RunDirectory, config: PeerConfig) -> Peer:
        found.append((target, config))
        raise Enough

    monkeypatch.setattr(Peer, "enter", enter)
    return found


def serve(*words: str) -> None:
    shown = CliRunner().invoke(main, ["serve", *words, "--port", "0"])
    assert isinstance(shown.exception, Enough), shown.output


def test_an_invitation_is_enough_to_serve_a_private_run(
    tmp_path: Path, entered: list[tuple[Join | RunDirectory, PeerConfig]]
) -> None:
    tables = {
        "model": {"name": "m", "fingerprint": "ab" * 32, "num_blocks": 6},
        "security": {"private": True},
    }
    created = create_run(tmp_path / "lab", tables)
    me = load_or_create(tmp_path / "identity").peer
    save_join(created.directory, replace(NEAR, run_id=created.run_id, run_name="lab"))
    line = invite(created.directory, me, Role.CLIENT, days=1).line
    serve(line)
    ((target, config),) = entered
    assert isinstance(target, Join)
    assert target.credential is not None
    assert (target.credential.grant.peer, target.credential.grant.role) == (me, Role.CLIENT)
    assert config.network.client_mode, "a gateway listens to no peer"


def test_a_run_on_this_network_is_served_by_its_name(
    monkeypatch: pytest.MonkeyPatch, entered: list[tuple[Join | RunDirectory, PeerConfig]]
) -> None:
    asked: list[tuple[str, str]] = []

    def find_run(group: str, peers: tuple[str, ...], *, host: str) -> Join:
        asked.append((group, host))
        return NEAR

    monkeypatch.setattr(lan, "find_run", find_run)
    serve("lan:tales")
    ((target, config),) = entered
    assert (target, config.lan, asked[0][0]) == (NEAR, "tales", "tales")


def test_a_name_of_this_network_serves_beside_other_runs(
    monkeypatch: pytest.MonkeyPatch, entered: list[tuple[Join | RunDirectory, PeerConfig]]
) -> None:
    given: list[ServeOptions] = []
    monkeypatch.setattr(lan, "find_run", lambda group, peers, *, host: NEAR)
    monkeypatch.setattr(commands, "run_serve", lambda options, screen: given.append(options))
    shown = CliRunner().invoke(main, ["serve", "lan:tales", "lan:news"])
    assert shown.exit_code == 0, shown.output
    assert given[0].target == NEAR
    assert given[0].others == (NEAR,)
