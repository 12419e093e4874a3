"""How to meet the errors of making and entering a run, on a network and in private. Each gets an empty directory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from peers.config import NetworkConfig
from peers.identity import hold, load_or_create
from peers.membership import Role, open_membership
from peers.network import PeerId
from swarm import node
from swarm.config import ModelSettings, RoundSettings, RunSpec, SecuritySettings, TrainingSettings
from swarm.config_file import config_text, load_config
from swarm.credential import OwnedRun
from swarm.entry import Search, find_entry
from swarm.join_string import Join, check_address, format_invitation, format_join, parse_join, resolve_join
from swarm.lan_records import LanPeer, choose_join
from swarm.new_run import create_run
from swarm.peer import Peer, PeerConfig
from swarm.run import RunId, load_owner_key, open_run
from swarm.state import lock_state
from tests.fakes import FakeDirectory
from tests.private_runs import Owner

ADDRESS = "/ip4/127.0.0.1/tcp/31330/p2p/12D3KooWEhjTZkKK4DN2rbq2zMkLKrxjYPGGfXhQJ8KmWPzXHtXb"
ANN = PeerId("Qm" + "a" * 44)
RUN = RunId("ab" * 16)
LINE = format_join(Join(run_id=RUN, run_name="tales", peers=(ADDRESS,)))
SPEC = RunSpec(name="tales", nonce="ab" * 16, model=ModelSettings(name="m", fingerprint="ab" * 32, num_blocks=6))
DAY = 86400


def file_in(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def new_run(path: Path) -> Path:
    create_run(path, {"model": {"name": "m", "fingerprint": "ab" * 32, "num_blocks": 2}})
    return path


def changed_run(path: Path, old: str, new: str) -> RunSpec:
    text = config_text(SPEC)
    assert old in text
    return load_config(file_in(path / "swarm.toml", text.replace(old, new)))


def enter_alone(path: Path) -> None:
    """What `swarm train RUN` does before the run's first `swarm join RUN`."""
    network = NetworkConfig(host="127.0.0.1", client_mode=True)
    run = resolve_join(str(new_run(path / "tales")))
    Peer.enter(run, PeerConfig(state_root=path / "states", cache_dir=path / "cache", network=network))


def find_nowhere(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node, "_FIND_RUN_SECONDS", -1.0)
        asyncio.run(node._find_run(FakeDirectory(time.time), RUN))


def lock_twice(path: Path) -> None:
    with lock_state(path / "state"):
        lock_state(path / "state")


def hold_twice(path: Path) -> None:
    with hold(path / "identity"):
        hold(path / "identity")


def forged_run() -> bytes:
    """As `sign_run` makes it, with another signature."""
    return bytes(msgpack.packb([1, bytes(32), b"body", bytes(64)]))


async def daemon_ended() -> None:
    async def wait_dead() -> str:
        return "killed"

    await node.Node._watch_daemon(SimpleNamespace(network=SimpleNamespace(wait_dead=wait_dead)))  # type: ignore[arg-type]


async def enter_uninvited() -> None:
    spec = replace(SPEC, security=SecuritySettings(private=True))
    nothing = SimpleNamespace(config=SimpleNamespace(private=None), network=SimpleNamespace(gate=None), spec=spec)
    await node._watch_revoked(nothing)  # type: ignore[arg-type]


def use_invitation(
    path: Path, needed: Role, *, peer: PeerId | None = None, days_ago: float = 0, role: str = ""
) -> None:
    """What a command does with an invitation before it dials anybody."""
    owned = OwnedRun(key=Ed25519PrivateKey.generate(), name="lab", nonce="0" * 32)
    begins_at = int(time.time() - days_ago * DAY)
    credential = owned.admit(peer, Role(role or needed), begins_at=begins_at, days=1)
    line = format_invitation(Join(run_id=owned.run, run_name="lab", peers=(ADDRESS,), credential=credential))
    find_entry(Search(target=parse_join(line), run=owned.run, state_root=path, state=None), needed)


def two_groups() -> tuple[LanPeer, LanPeer]:
    """Neighbours who chose one name."""
    runs = (RUN, RunId("cd" * 16))
    return tuple(LanPeer(group="lab", run=run, run_name="tales", addresses=(ADDRESS,)) for run in runs)  # type: ignore[return-value]


def show_membership(owner: Owner, begins_in: int = 0) -> None:
    moment = int(time.time())
    shown = Owner().sign(ANN) if not begins_in else owner.sign(ANN, not_before=moment + begins_in)
    open_membership(shown, owner=owner.public, run=owner.run, peer=ANN).check_time(moment)


MADE: dict[str, Callable[[Path], object]] = {
    "its checksum is wrong": lambda path: parse_join(LINE[:20] + ("A" if LINE[20] != "A" else "B") + LINE[21:]),
    "cut off or mistyped; copy": lambda path: parse_join("swarm1:A"),
    "is no join string, run directory or file": lambda path: resolve_join("tels"),
    "this join string has version": lambda path: parse_join("swarm2:AAAA"),
    "holds no swarm.toml": lambda path: resolve_join(str(path)),
    "is not a peer's address": lambda path: check_address("10.0.0.5:31330"),
    "no peer of this run is known yet": enter_alone,
    "the peers that answered do not know run": find_nowhere,
    "p2pd ended": lambda path: asyncio.run(daemon_ended()),
    "is in use by another process": lock_twice,
    "state directory … cannot be used": lambda path: lock_state(file_in(path / "a", "") / "state"),
    "is in use by process": hold_twice,
    "is not a libp2p RSA key": lambda path: load_or_create(file_in(path / "identity", "nonsense")),
    "cannot be used: …; check its directory": lambda path: load_or_create(file_in(path / "a", "") / "identity"),
    "the signature on its settings": lambda path: open_run(forged_run(), RUN),
    # On one network
    "nobody on this network answers": lambda path: choose_join("lab", []),
    "runs on this network": lambda path: choose_join("lab", two_groups()),
    # Private runs
    "is private; send the id": lambda path: asyncio.run(enter_uninvited()),
    "this invitation is for peer": lambda path: use_invitation(path, Role.HOST, peer=ANN),
    "this invitation expired": lambda path: use_invitation(path, Role.HOST, days_ago=3),
    "this command needs one for": lambda path: use_invitation(path, Role.HOST, role="client"),
    "its membership begins": lambda path: show_membership(Owner(), begins_in=600),
    "not signed by this run's owner": lambda path: show_membership(Owner()),
    # Making a run
    "exists already; choose another NAME": lambda path: [new_run(path / "tales") for _ in range(2)],
    "is not a setting; the nearest": lambda path: changed_run(path, "lora_rank", "lora_rang"),
    "is not TOML": lambda path: changed_run(path, "[rounds]", "[rounds"),
    "use a number from": lambda path: TrainingSettings(batch_size=0),
    "use one of": lambda path: TrainingSettings(schedule="cosin"),
    "only the run's owner has it": lambda path: load_owner_key(path / "owner.key"),
    "a round needs at least one step": lambda path: replace(SPEC, rounds=RoundSettings(round_samples=1)),
}
