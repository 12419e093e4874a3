"""How to meet the errors of making and entering a run, on a network and in private. Each gets an empty directory."""

from __future__ import annotations

import asyncio
import errno
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from peers.config import NetworkConfig
from peers.hivemind_members import Members
from peers.identity import hold, load_or_create
from peers.network import PeerId
from peers.private.gate import Gate, Shown
from peers.private.membership import Role, open_membership
from swarm import node
from swarm.config import ModelSettings, RoundSettings, RunSpec, SecuritySettings, TrainingSettings
from swarm.config_file import config_text, load_config
from swarm.join_string import Join, check_address, format_invitation, format_join, known_of, parse_join, resolve_join
from swarm.lan.discovery import read_peers_file, search
from swarm.lan.records import LanPeer, check_group, choose_join
from swarm.new_run import create_run
from swarm.peer import Peer
from swarm.peer_config import PeerConfig
from swarm.private.credential import OwnedRun, credential_from
from swarm.private.entry import Search, find_entry
from swarm.private.inviting import invite, revoke
from swarm.run import RunId, load_owner_key, open_run, save_run
from swarm.state import lock_state
from swarm.training.jobs import train
from tests.fakes import FakeDirectory
from tests.private_runs import Owner

ADDRESS = "/ip4/127.0.0.1/tcp/31330/p2p/12D3KooWEhjTZkKK4DN2rbq2zMkLKrxjYPGGfXhQJ8KmWPzXHtXb"
ANN, BOB = (PeerId("Qm" + letter * 44) for letter in "ab")
RUN = RunId("ab" * 16)
LINE = format_join(Join(run_id=RUN, run_name="tales", peers=(ADDRESS,)))
SPEC = RunSpec(name="tales", nonce="ab" * 16, model=ModelSettings(name="m", fingerprint="ab" * 32, num_blocks=6))
DAY = 86400
Asking = Callable[[PeerId], Awaitable[Shown]]


def file_in(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def new_run(path: Path, *, private: bool = False) -> Path:
    model = {"name": "m", "fingerprint": "ab" * 32, "num_blocks": 2}
    create_run(path, {"model": model, "security": {"private": private}})
    return path


def unowned(path: Path) -> Path:
    """A copy that the owner gave away without the key."""
    (new_run(path / "tales", private=True) / "owner.key").unlink()
    return path / "tales"


def invite_from(directory: Path) -> None:
    invite(directory, ANN, Role.HOST, days=1)


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


def hold_without_locks(path: Path) -> None:
    """Some network file systems have none."""

    def refuse(*given: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peers.identity.fcntl.flock", refuse)
        hold(path / "identity")


def save_two_runs(path: Path) -> None:
    for _ in range(2):
        blob = known_of(resolve_join(str(new_run(path / secrets.token_hex(4))))).blob
        assert blob is not None
        save_run(path, blob)


def no_multicast(path: Path) -> None:
    def refuse(**given: object) -> None:
        raise OSError("no interface")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zeroconf.Zeroconf", refuse)
        search("lab", host="127.0.0.1")


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


async def train_as_client() -> None:
    """What `swarm train` does with a client's invitation, once it is in."""
    spec_and_gate = SimpleNamespace(spec=SPEC, network=SimpleNamespace(gate=gate_of(Role.CLIENT)))
    await train(spec_and_gate, None, None)  # type: ignore[arg-type]


async def host_as_client() -> None:
    owner = Owner()

    async def ask(peer: PeerId) -> Shown:
        return Shown(owner.sign(peer, Role.CLIENT), b"")

    await gate_of(Role.HOST, owner, ask).let_in(ANN, "DHTProtocol.rpc_store")


def check_own_expired() -> None:
    gate_of(Role.HOST, clock=lambda: time.time() + DAY).check_own()


async def ask_an_open_run() -> None:
    """A peer that is in no private run does not know the question."""

    async def refuse(*given: object) -> None:
        raise ValueError("failed to negotiate: protocols not supported")

    owner = Owner()
    members = Members(SimpleNamespace(open_to_anybody=refuse), owner.members(owner.sign(ANN)), owner.run, ANN)
    await members._ask(ANN)


async def ask_nobody(peer: PeerId) -> Shown:
    raise AssertionError(peer)


def gate_of(
    role: Role, owner: Owner | None = None, ask: Asking = ask_nobody, clock: Callable[[], float] = time.time
) -> Gate:
    owner = owner or Owner()
    return Gate(owner.members(owner.sign(BOB, role)), run=owner.run, me=BOB, ask=ask, clock=clock)


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
    begins_at = moment + begins_in
    by = owner if begins_in else Owner()
    shown = by.sign(ANN, not_before=begins_at, expires_at=begins_at + 3600)
    open_membership(shown, owner=owner.public, run=owner.run, peer=ANN).check_time(moment)


MADE: dict[str, Callable[[Path], object]] = {
    "use an IP address of this machine": lambda path: NetworkConfig(host="localhost"),
    "use an address such as /ip4": lambda path: NetworkConfig(announce=("203.0.113.7",)),
    "its checksum is wrong": lambda path: parse_join(LINE[:20] + ("A" if LINE[20] != "A" else "B") + LINE[21:]),
    "cut off or mistyped; copy": lambda path: parse_join("swarm1:A"),
    "is no join string, run directory or file": lambda path: resolve_join("tels"),
    "this join string has version": lambda path: parse_join("swarm2:AAAA"),
    "holds no swarm.toml": lambda path: resolve_join(str(path)),
    "is not a join string; it starts": lambda path: parse_join("hello"),
    "is not a peer's address": lambda path: check_address("10.0.0.5:31330"),
    "no peer of this run is known yet": enter_alone,
    "the peers that answered do not know run": find_nowhere,
    "p2pd ended": lambda path: asyncio.run(daemon_ended()),
    "is in use by another process": lock_twice,
    "state directory … cannot be used": lambda path: lock_state(file_in(path / "a", "") / "state"),
    "holds the state of another run": save_two_runs,
    "is in use by process": hold_twice,
    "is not a libp2p RSA key": lambda path: load_or_create(file_in(path / "identity", "nonsense")),
    "cannot be used: …; check its directory": lambda path: load_or_create(file_in(path / "a", "") / "identity"),
    "put --state on a local disk": hold_without_locks,
    "the signature on its settings": lambda path: open_run(forged_run(), RUN),
    # On one network
    "nobody on this network answers": lambda path: choose_join("lab", []),
    "runs on this network": lambda path: choose_join("lab", two_groups()),
    "takes no multicast": no_multicast,
    "cannot name a group": lambda path: check_group("no where"),
    "peers file … cannot be read": lambda path: read_peers_file(path / "peers.txt"),
    "…, line …": lambda path: read_peers_file(file_in(path / "peers.txt", "# ours\n10.0.0.5:31330\n")),
    # Private runs
    "is private; send the id": lambda path: asyncio.run(enter_uninvited()),
    "this invitation is for peer": lambda path: use_invitation(path, Role.HOST, peer=ANN),
    "this invitation expired": lambda path: use_invitation(path, Role.HOST, days_ago=3),
    "this command needs one for": lambda path: use_invitation(path, Role.HOST, role="client"),
    "this invitation is malformed; copy": lambda path: credential_from([b"", "lab", "", b"", b""]),
    "this peer was invited as a": lambda path: asyncio.run(train_as_client()),
    "may not … in this private run": lambda path: asyncio.run(host_as_client()),
    "this peer (…) is not let into": lambda path: check_own_expired(),
    "it has no membership; send": lambda path: asyncio.run(ask_an_open_run()),
    "its membership begins": lambda path: show_membership(Owner(), begins_in=600),
    "its membership expired": lambda path: show_membership(Owner(), begins_in=-7200),
    "not signed by this run's owner": lambda path: show_membership(Owner()),
    "only the run's owner can invite and revoke": lambda path: invite_from(unowned(path)),
    "is not private: whoever has": lambda path: invite_from(new_run(path / "tales")),
    "nobody could be reached by it yet": lambda path: invite_from(new_run(path / "tales", private=True)),
    "is not a peer id; use what": lambda path: revoke(resolve_join(str(new_run(path / "tales", private=True))), "bob"),
    "only the run's owner can revoke": lambda path: revoke(parse_join(LINE), ANN),
    # Making a run
    "exists already; choose another NAME": lambda path: [new_run(path / "tales") for _ in range(2)],
    "is not a setting; the nearest": lambda path: changed_run(path, "lora_rank", "lora_rang"),
    "is not TOML": lambda path: changed_run(path, "[rounds]", "[rounds"),
    "use a number from": lambda path: TrainingSettings(batch_size=0),
    "… is …; use one of": lambda path: TrainingSettings(schedule="cosin"),
    "cannot be made (…); choose another NAME": lambda path: new_run(file_in(path / "a", "") / "tales"),
    "use a …number": lambda path: changed_run(path, "batch_size = 32", "batch_size = true"),
    "use true or false": lambda path: changed_run(path, "overlap = false", "overlap = 0"),
    "is missing; `swarm init` writes it": lambda path: changed_run(path, "nonce = ", "# nonce = "),
    "do not go together": lambda path: RoundSettings(merging="power", robust="krum"),
    "training.warmup_samples is": lambda path: TrainingSettings(warmup_samples=20, total_samples=10),
    "only the run's owner has it": lambda path: load_owner_key(path / "owner.key"),
    "a round needs at least one step": lambda path: replace(SPEC, rounds=RoundSettings(round_samples=1)),
}
