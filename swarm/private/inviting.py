"""What the owner of a private run does: let somebody in, and put somebody out. On disk; no network."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

from peers.network import PeerId
from peers.private.membership import Grant, Role
from peers.private.revocation import Revocations
from peers.records import is_peer_id
from swarm.errors import BadConfig, BadJoinString
from swarm.join_string import Join, RunDirectory, format_invitation, is_state, resolve_join
from swarm.private.credential import OwnedRun
from swarm.private.entry import owned_run
from swarm.private.revoking import load_revoked, sign_and_save
from swarm.run import KEY_NAME, public_bytes
from swarm.state import OWN_STATE


@dataclass(frozen=True, slots=True, kw_only=True)
class Invitation:
    """What to send, and what it says."""

    line: str
    grant: Grant


def invite(directory: Path, peer: str | None, role: Role, *, days: float) -> Invitation:
    """Let `peer`, or whoever gets the line, into the private run in `directory`, from now on for `days`.

    Raises:
        BadConfig: the run is not private, its owner's key is not here, or `peer` is no peer id.
        BadJoinString: nobody is known whom the newcomer could start from.
    """
    target = _run_directory(directory)
    owned = _owned(target)
    if target.join is None:
        raise BadJoinString(f"nobody could be reached by it yet; start the run's first peer: swarm join {directory}")
    begins_at = int(time.time())
    if peer is not None:
        _check_peer(peer)
        begins_at = max(begins_at, _revoked(target, owned).revoked_at(PeerId(peer)) + 1)
    credential = owned.admit(None if peer is None else PeerId(peer), role, begins_at=begins_at, days=days)
    join = Join(run_id=owned.run, run_name=owned.name, peers=target.join.peers, credential=credential)
    return Invitation(line=format_invitation(join), grant=credential.grant)


def revoke(target: Join | RunDirectory, who: str) -> tuple[int, str]:
    """Put a peer, or the serial of an invitation, on the owner's list in the run's directory. Returns the list's number
    and what was done, in words.

    Raises:
        BadConfig: the run is not private, its owner's key is not here, `who` is neither, or it cannot be written.
        BadRecord: the list is full.
    """
    if not isinstance(target, RunDirectory):
        raise BadConfig("only the run's owner can revoke; give the directory that `swarm init` made")
    owned = _owned(target)
    revoked, now = _revoked(target, owned), int(time.time())
    if re.fullmatch("[0-9a-f]{16}", who):
        revoked, words = revoked.with_serial(bytes.fromhex(who), now), f"invitation {who} is void, whoever used it"
    else:
        _check_peer(who)
        revoked, words = revoked.with_peer(PeerId(who), now), f"peer {who} is out, and whomever it let in"
    sign_and_save(revoked, owned.key, target.path)
    return revoked.number, words


def until_words(grant: Grant) -> str:
    """When a grant ends, in local time."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(grant.expires_at))


def _run_directory(directory: Path) -> RunDirectory:
    target = resolve_join(str(directory))
    if not isinstance(target, RunDirectory):
        raise BadConfig(f"{directory} is not a run's directory; give the one that `swarm init` made")
    return target


def _owned(target: RunDirectory) -> OwnedRun:
    if is_state(target.path) or not (target.path / KEY_NAME).exists():
        raise BadConfig(f"{target.path} has no {KEY_NAME}; only the run's owner can invite and revoke")
    owned = owned_run(target)
    if owned is None:
        raise BadConfig(
            f"the run in {target.path} is not private: whoever has its join string may enter, nobody can be"
            " invited or revoked; make a private one with `swarm init NAME --private`"
        )
    return owned


def _revoked(target: RunDirectory, owned: OwnedRun) -> Revocations:
    places = [target.path, target.path / OWN_STATE]
    return load_revoked(places, owner=public_bytes(owned.key), run=owned.run)


def _check_peer(peer: str) -> None:
    if not is_peer_id(peer):
        raise BadConfig(
            f"{peer[:80]!r} is not a peer id; use what `swarm id` prints on the other machine, such as QmYyQ…"
        )
