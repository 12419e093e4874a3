"""Invitations to private runs: one line for one machine, from the owner's directory to a peer's state directory."""

from __future__ import annotations

import base64
import itertools
import re
import stat
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import msgpack
import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from peers.identity import load_or_create, peer_in
from peers.network import PeerId
from peers.private.membership import MAX_LIFE_DAYS, Membership, Role, open_membership
from swarm.cli.main import main
from swarm.config_file import load_config
from swarm.errors import BadConfig, BadJoinString, NotInvited
from swarm.join_string import Join, _checksum, format_invitation, format_join, parse_join, resolve_join, save_join
from swarm.new_run import create_run
from swarm.private.credential import MEMBERSHIP_NAME, OwnedRun, load_credential, save_credential
from swarm.private.entry import PrivateRun, Search, find_entry
from swarm.private.inviting import invite, revoke
from swarm.private.revoking import REVOKED_NAME
from swarm.run import RunId, load_owner_key
from swarm.state import IDENTITY_NAME, claim_state, lock_state

MODEL = {"name": "m", "fingerprint": "ab" * 32, "num_blocks": 4}
ADDRESS = "/ip4/127.0.0.1/tcp/31330/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
ANN = "Qm" + "a" * 44


def new_run(directory: Path, *, private: bool = True, started: bool = True) -> OwnedRun:
    run = create_run(directory, {"model": MODEL, "security": {"private": private}})
    if started:
        save_join(directory, Join(run_id=run.run_id, run_name=run.spec.name, peers=(ADDRESS,)))
    return OwnedRun(key=load_owner_key(directory / "owner.key"), name=run.spec.name, nonce=run.spec.nonce)


@cache
def _made_key(number: int) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.fixture(autouse=True)
def _few_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new RSA key takes half a second: all tests have the same ones, in the same order."""
    numbers = itertools.count()
    monkeypatch.setattr("peers.identity._new_key", lambda: _made_key(next(numbers)))


@pytest.fixture
def owned(tmp_path: Path) -> OwnedRun:
    return new_run(tmp_path / "lab")


def line(tmp_path: Path, peer: str | None, role: Role = Role.HOST, days: float = 30.0) -> str:
    return invite(tmp_path / "lab", peer, role, days=days).line


def machine(root: Path) -> PeerId:
    """What `swarm id` prints there."""
    path = root / IDENTITY_NAME
    return peer_in(path) or load_or_create(path).peer


def search(root: Path, invitation: str | Path, state: Path | None = None) -> Search:
    target = resolve_join(str(invitation))
    run = target.run_id if isinstance(target, Join) else load_run_id(target.path)
    return Search(target=target, run=run, state_root=root, state=state)


def load_run_id(directory: Path) -> RunId:
    credential = load_credential(directory)
    assert credential is not None
    return credential.run


def entered(root: Path, invitation: str | Path, needed: Role = Role.HOST, state: Path | None = None) -> Membership:
    """What a peer that starts there shows, checked as others check it. Its state directory stays claimed."""
    found = search(root, invitation, state)
    entry = find_entry(found, needed)
    assert entry is not None
    directory = claim_state(root, found.run) if state is None else lock_state(state)
    return shown(found, entry.begin(directory.path), directory.path)


def shown(found: Search, private: PrivateRun, state: Path) -> Membership:
    members = private.members
    peer = peer_in(state / IDENTITY_NAME)
    assert peer is not None
    return open_membership(members.membership, owner=members.owner, run=found.run, peer=peer)


def test_an_invitation_comes_back_equal_also_folded_and_quoted(tmp_path: Path, owned: OwnedRun) -> None:
    text = line(tmp_path, ANN, Role.TRAINER)
    join = parse_join(text)
    assert join.credential is not None
    assert (join.run_id, join.run_name, join.peers) == (owned.run, "lab", (ADDRESS,))
    assert (join.credential.grant.peer, join.credential.grant.role) == (ANN, Role.TRAINER)
    folded = "\n ".join(text[start : start + 50] for start in range(0, len(text), 50))
    assert resolve_join(f" '{folded}'\n") == join
    assert format_invitation(join) == text
    assert parse_join(format_join(join)) == replace(join, credential=None)
    assert len(text) < 600


@given(st.integers(min_value=13), st.sampled_from("abcXYZ019-_"))
def test_a_mistyped_character_is_noticed(place: int, character: str) -> None:
    text = SAMPLE
    place = 13 + place % (len(text) - 13)
    if text[place] != character:
        with pytest.raises(BadJoinString):
            parse_join(text[:place] + character + text[place + 1 :])


def test_every_truncated_copy_is_noticed() -> None:
    for length in range(len(SAMPLE)):
        with pytest.raises(BadJoinString):
            parse_join(SAMPLE[:length])


def sample() -> str:
    owned = OwnedRun(key=Ed25519PrivateKey.generate(), name="lab", nonce="0" * 32)
    credential = owned.admit(PeerId(ANN), Role.HOST, begins_at=int(time.time()), days=3)
    return format_invitation(Join(run_id=owned.run, run_name="lab", peers=(ADDRESS,), credential=credential))


SAMPLE = sample()


def test_who_changes_a_field_and_mends_the_checksum_is_refused(tmp_path: Path, owned: OwnedRun) -> None:
    join = parse_join(line(tmp_path, ANN))
    bearer = parse_join(line(tmp_path, None))
    assert join.credential is not None
    assert bearer.credential is not None
    fields = join.credential.pack()
    others = OwnedRun(key=owned.key, name="other", nonce=owned.nonce).admit(None, Role.HOST, begins_at=1, days=9).pack()
    for place, value in enumerate(others):
        if fields[place] != value:
            changed = [*fields[:place], value, *fields[place + 1 :]]
            with pytest.raises((NotInvited, BadJoinString)):
                parse_join(packed([[ADDRESS], changed]))
    for wrong in ([], [[ADDRESS]], [[7], fields], [[ADDRESS], fields[:4]], {"a": 1}, [[], fields]):
        with pytest.raises((NotInvited, BadJoinString)):
            parse_join(packed(wrong))
    stolen_key = [*bearer.credential.pack()[:4], b"\1" * 32]
    with pytest.raises(NotInvited, match="not the one that the run's owner granted"):
        parse_join(packed([[ADDRESS], stolen_key]))


def packed(value: object) -> str:
    payload = msgpack.packb(value)
    return "swarminvite1:" + base64.urlsafe_b64encode(payload + _checksum(payload)).decode().rstrip("=")


def test_the_invited_machine_enters_as_the_peer_that_was_invited(tmp_path: Path, owned: OwnedRun) -> None:
    root = tmp_path / "bob"
    text = line(tmp_path, machine(root), Role.TRAINER)
    membership = entered(root, text, Role.TRAINER)
    assert (membership.peer, membership.role) == (machine(root), Role.TRAINER)


def test_further_peers_of_that_machine_have_ids_of_their_own_and_are_let_in_by_it(
    tmp_path: Path, owned: OwnedRun
) -> None:
    root = tmp_path / "bob"
    text = line(tmp_path, machine(root))
    members = [entered(root, text) for _ in range(3)]
    assert members[0].peer == machine(root)
    assert len({member.peer for member in members}) == 3
    assert {member.grant.peer for member in members} == {machine(root)}


def test_a_stolen_invitation_is_refused_at_once_and_names_both_machines(tmp_path: Path, owned: OwnedRun) -> None:
    root = tmp_path / "eve"
    text = line(tmp_path, machine(tmp_path / "bob"))
    with pytest.raises(NotInvited, match="is for peer") as refusal:
        entered(root, text)
    assert machine(tmp_path / "bob") in str(refusal.value)
    assert f"--for {machine(root)}" in str(refusal.value)
    assert sorted(path.name for path in root.iterdir()) == [IDENTITY_NAME]  # and nothing was left behind


def test_whoever_has_the_bearers_line_enters_and_so_do_all_peers_of_that_machine(
    tmp_path: Path, owned: OwnedRun
) -> None:
    text = line(tmp_path, None, Role.CLIENT, days=1)
    members = [entered(tmp_path / name, text, Role.CLIENT) for name in ("bob", "bob", "cem")]
    assert len({member.peer for member in members}) == 3
    assert {member.grant.peer for member in members} == {None}
    assert {member.role for member in members} == {Role.CLIENT}


def test_afterwards_the_state_directory_or_the_plain_line_is_enough(tmp_path: Path, owned: OwnedRun) -> None:
    root = tmp_path / "bob"
    text = line(tmp_path, machine(root))
    first = entered(root, text)
    state = root / owned.run / "peer-0"
    assert stat.S_IMODE((state / MEMBERSHIP_NAME).stat().st_mode) == 0o600
    plain = format_join(parse_join(text))
    assert entered(root, plain).grant == first.grant
    (state / "run.signed").write_bytes(b"")  # so that it is a state directory, as after a first start
    assert entered(root, state).grant == first.grant
    assert find_entry(search(tmp_path / "eve", plain), Role.CLIENT) is None


def test_a_chosen_state_directory_has_the_identity_that_was_printed_for_it(tmp_path: Path, owned: OwnedRun) -> None:
    root, state = tmp_path / "bob", tmp_path / "chosen"
    text = line(tmp_path, load_or_create(state / IDENTITY_NAME).peer)
    membership = entered(root, text, state=state)
    assert membership.peer == membership.grant.peer == load_or_create(state / IDENTITY_NAME).peer
    with pytest.raises(NotInvited, match="is for peer"):
        find_entry(search(tmp_path / "eve", text), Role.HOST)


def test_the_owners_directory_admits_whoever_starts_from_it(tmp_path: Path, owned: OwnedRun) -> None:
    target = resolve_join(str(tmp_path / "lab"))
    found = Search(target=target, run=owned.run, state_root=tmp_path / "root")
    entry = find_entry(found, Role.HOST)
    assert entry is not None
    with claim_state(tmp_path / "root", owned.run) as state:
        membership = shown(found, entry.begin(state.path), state.path)
    assert (membership.role, membership.grant.peer) == (Role.HOST, membership.peer)
    membership.check_time(time.time() + 300 * 86400)


def test_a_public_run_needs_no_entry(tmp_path: Path) -> None:
    new_run(tmp_path / "open", private=False)
    target = resolve_join(str(tmp_path / "open"))
    run = parse_join((tmp_path / "open" / "join.txt").read_text()).run_id
    assert find_entry(Search(target=target, run=run, state_root=tmp_path), Role.HOST) is None
    with pytest.raises(BadConfig, match="is not private"):
        invite(tmp_path / "open", ANN, Role.HOST, days=1)
    with pytest.raises(BadConfig, match="is not private"):
        revoke(target, ANN)


@pytest.mark.parametrize("peer", ["machine", None])
def test_too_late_and_too_little_are_refused_before_anything_is_dialled(
    tmp_path: Path, owned: OwnedRun, peer: str | None
) -> None:
    root = tmp_path / "bob"
    who = None if peer is None else machine(root)
    old = owned.admit(who, Role.HOST, begins_at=int(time.time()) - 3 * 86400, days=1)
    join = Join(run_id=owned.run, run_name="lab", peers=(ADDRESS,), credential=old)
    with pytest.raises(NotInvited, match=r"expired 2\.0 days ago"):
        find_entry(search(root, format_invitation(join)), Role.CLIENT)
    client = line(tmp_path, who, Role.CLIENT)
    with pytest.raises(NotInvited, match="is for a client, this command needs one for a host"):
        find_entry(search(root, client), Role.HOST)
    assert find_entry(search(root, client), Role.CLIENT) is not None


def test_a_newer_and_wider_invitation_is_preferred_to_what_is_saved(tmp_path: Path, owned: OwnedRun) -> None:
    root = tmp_path / "bob"
    entered(root, line(tmp_path, machine(root), Role.CLIENT), Role.CLIENT)
    wide = line(tmp_path, machine(root), Role.HOST)
    entered(root, wide)
    plain = format_join(parse_join(wide))
    assert entered(root, plain).role is Role.HOST


def test_a_torn_membership_file_is_left_aside(tmp_path: Path, owned: OwnedRun) -> None:
    root = tmp_path / "bob"
    text = line(tmp_path, machine(root))
    entered(root, text)
    file = root / owned.run / "peer-0" / MEMBERSHIP_NAME
    for content in (file.read_bytes()[:-5], b"", b"\x91" * 100):
        file.write_bytes(content)
        with pytest.raises(NotInvited):
            load_credential(file.parent)
        assert find_entry(search(root, format_join(parse_join(text))), Role.HOST) is None


def test_a_saved_credential_comes_back_and_is_replaced_whole(tmp_path: Path, owned: OwnedRun) -> None:
    assert load_credential(tmp_path) is None
    for role in Role:
        credential = owned.admit(None, role, begins_at=5, days=1)
        save_credential(tmp_path, credential)
        assert load_credential(tmp_path) == credential
    with pytest.raises(BadConfig, match="cannot be written"):
        save_credential(tmp_path / "missing", credential)


def test_who_was_revoked_is_out_until_invited_again(tmp_path: Path, owned: OwnedRun) -> None:
    root = tmp_path / "bob"
    bob = machine(root)
    before = parse_join(line(tmp_path, bob)).credential
    target = resolve_join(str(tmp_path / "lab"))
    assert revoke(target, bob)[0] == 1
    after = parse_join(line(tmp_path, bob)).credential
    assert before is not None
    assert after is not None
    entry = find_entry(Search(target=target, run=owned.run, state_root=tmp_path / "root"), Role.HOST)
    assert entry is not None
    with claim_state(tmp_path / "root", owned.run) as state:
        revoked = entry.begin(state.path).members.revoked
    assert "revoked" in revoked.reason(Membership(peer=bob, grant=before.grant))
    assert revoked.reason(Membership(peer=bob, grant=after.grant)) == ""
    assert revoke(target, before.grant.serial.hex())[0] == 2


def test_what_cannot_be_granted_is_said(tmp_path: Path, owned: OwnedRun) -> None:
    with pytest.raises(BadConfig, match="is not a peer id"):
        invite(tmp_path / "lab", "bob", Role.HOST, days=1)
    with pytest.raises(BadConfig, match="is not a peer id"):
        revoke(resolve_join(str(tmp_path / "lab")), "bob")
    for days in (0.0, MAX_LIFE_DAYS + 1.0):
        with pytest.raises(BadConfig, match="cannot be made"):
            invite(tmp_path / "lab", ANN, Role.HOST, days=days)
    new_run(tmp_path / "fresh", started=False)
    with pytest.raises(BadJoinString, match="start the run's first peer"):
        invite(tmp_path / "fresh", ANN, Role.HOST, days=1)
    (tmp_path / "lab" / "owner.key").unlink()
    with pytest.raises(BadConfig, match="only the run's owner"):
        invite(tmp_path / "lab", ANN, Role.HOST, days=1)
    with pytest.raises(BadConfig, match="only the run's owner"):
        revoke(parse_join(SAMPLE), ANN)


def call(root: Path, *words: str) -> Result:
    return CliRunner().invoke(main, list(words), env={"XDG_DATA_HOME": str(root)})


def test_the_three_commands_of_a_newcomer_and_an_owner(tmp_path: Path, owned: OwnedRun) -> None:
    printed = call(tmp_path / "bob", "id")
    bob = printed.stdout.strip()
    assert bob == machine(tmp_path / "bob" / "swarmtune")
    invited = call(tmp_path / "own", "invite", str(tmp_path / "lab"), "--for", bob, "--role", "client", "--days", "2")
    assert invited.exit_code == 0, invited.output
    join = parse_join(invited.stdout)
    assert join.credential is not None
    assert (join.credential.grant.peer, join.credential.grant.role) == (bob, Role.CLIENT)
    assert 1.9 < (join.credential.grant.expires_at - time.time()) / 86400 <= 2
    assert f"swarm revoke {tmp_path / 'lab'} {bob}" in invited.stderr
    anyone = call(tmp_path / "own", "invite", str(tmp_path / "lab"), "--anyone")
    serial = re.findall(r"lab ([0-9a-f]{16})", anyone.stderr.replace("\n", " "))
    assert "WHOEVER has this line" in anyone.stderr
    credential = parse_join(anyone.stdout).credential
    assert credential is not None
    assert serial == [credential.grant.serial.hex()]
    stolen = call(tmp_path / "eve", "status", invited.stdout.strip())
    assert stolen.exit_code == 1
    assert "is for peer" in stolen.output
    both = call(tmp_path / "own", "invite", str(tmp_path / "lab"), "--for", bob, "--anyone")
    assert "give --for PEER_ID, or --anyone" in both.output


def test_a_private_run_says_so_in_its_settings(tmp_path: Path, owned: OwnedRun) -> None:
    assert load_config(tmp_path / "lab").security.private
    assert (
        "private = true  # only peers that the run's owner has invited" in (tmp_path / "lab" / "swarm.toml").read_text()
    )
    assert not (tmp_path / "lab" / REVOKED_NAME).exists()
