"""How one peer enters a private run: which identity it has there, and by which membership others let it in.

The owner's grant names a machine's identity (`swarm id`) or a key in the invitation. The first peer of that machine in
the run takes this very identity; further ones have their own, and the granted key lets them in. Nobody else can.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from peers.identity import Identity, load_or_create, peer_in
from peers.private.gate import MemberConfig
from peers.private.membership import Role, let_in_by_bearer, let_in_by_member
from swarm.config_file import CONFIG_NAME, load_config, write_new_file
from swarm.errors import BadConfig, NotInvited
from swarm.join_string import Join, RunDirectory, is_state
from swarm.private.credential import OWN_DAYS, Credential, OwnedRun, load_credential, save_credential
from swarm.private.revoking import load_revoked
from swarm.run import KEY_NAME, RunId, load_owner_key
from swarm.state import IDENTITY_NAME, states_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """Where a peer's credentials and identities may be: what JOIN was, the chosen state directory, and all others."""

    target: Join | RunDirectory
    run: RunId
    state_root: Path
    state: Path | None = None

    def states(self) -> list[Path]:
        """State directories of this run on this machine, the likeliest first."""
        own = [self.target.path] if isinstance(self.target, RunDirectory) and is_state(self.target.path) else []
        chosen = [] if self.state is None else [self.state]
        return list(dict.fromkeys([*chosen, *own, *states_of(self.state_root, self.run)]))

    def machine(self) -> Path:
        """The identity that `swarm id` prints."""
        return self.state_root / IDENTITY_NAME


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateRun:
    """What a node needs in a private run: how others let it in, and in which directories, its own state first, the
    owner's list of those revoked may be.
    """

    members: MemberConfig
    lists: tuple[Path, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A checked way in. `key` is what the grant was made to, `identity_file` where that key is, if it is a peer's.

    With `owned`, the owner's key is here, and signs for whichever peer starts.
    """

    search: Search
    credential: Credential | None = None
    key: Identity | Ed25519PrivateKey | None = None
    identity_file: Path | None = None
    owned: OwnedRun | None = None

    def begin(self, state: Path) -> PrivateRun:
        """This peer's place in the run; `state` gets the identity, if it has none yet, and the credential.

        Raises:
            BadConfig: the directory cannot be written.
            BadIdentity: its identity cannot be read.
        """
        if self.identity_file is not None and not (state / IDENTITY_NAME).exists():
            self._take_identity(state)
        identity = load_or_create(state / IDENTITY_NAME)
        credential = self.credential
        if self.owned is not None:
            credential = self.owned.admit(identity.peer, Role.HOST, begins_at=int(time.time()), days=OWN_DAYS)
        if credential is None:
            raise AssertionError("an entry has a credential or the owner's key")
        save_credential(state, credential)
        membership, grant = credential.granted, credential.grant
        if grant.peer != identity.peer:
            if isinstance(self.key, Ed25519PrivateKey):
                membership = let_in_by_bearer(credential.granted, self.key, identity.peer)
            elif self.key is not None:
                membership = let_in_by_member(credential.granted, self.key, identity.peer)
        target = self.search.target
        lists = (state, target.path) if isinstance(target, RunDirectory) else (state,)
        revoked = load_revoked(lists, owner=credential.owner, run=self.search.run)
        members = MemberConfig(owner=credential.owner, membership=membership, revoked=revoked)
        return PrivateRun(members=members, lists=lists)

    def _take_identity(self, state: Path) -> None:
        """The first peer of the run on this machine is the one that was invited; two at once cannot have one id."""
        file = self.identity_file
        others = [path / IDENTITY_NAME for path in self.search.states() if path != state]
        if file is None or peer_in(file) in [peer_in(other) for other in others]:
            return
        try:
            write_new_file(state / IDENTITY_NAME, file.read_bytes(), mode=0o400)
        except OSError as error:
            raise BadConfig(f"{file} cannot be read ({error.strerror}); check its owner") from None


def find_entry(search: Search, needed: Role) -> Entry | None:
    """How this machine gets into the run; None where nothing here says that the run is private.

    Raises:
        NotInvited: the invitation is not for this machine, has expired, or is for a lesser role than `needed`.
        BadConfig: a file cannot be read.
    """
    owned = owned_run(search.target)
    if owned is not None:
        return Entry(search=search, owned=owned)
    if isinstance(search.target, Join) and search.target.credential is not None:
        return _checked(_with_key(search, search.target.credential), needed)
    found = sorted(_saved(search.states(), search.run), key=_rank, reverse=True)
    usable = [entry for entry in (_with_key_or_none(search, one) for one in found) if entry is not None]
    if not usable:
        return _with_key(search, found[0]) if found else None
    return _checked(usable[0], needed)


def owned_run(target: Join | RunDirectory) -> OwnedRun | None:
    """The private run whose owner's key is in the directory that JOIN names, if it is one.

    Raises:
        BadConfig: its settings or key cannot be read.
    """
    if not isinstance(target, RunDirectory) or is_state(target.path) or not (target.path / KEY_NAME).exists():
        return None
    spec = load_config(target.path / CONFIG_NAME)
    if not spec.security.private:
        return None
    return OwnedRun(key=load_owner_key(target.path / KEY_NAME), name=spec.name, nonce=spec.nonce)


def _checked(entry: Entry, needed: Role) -> Entry:
    if entry.credential is not None:
        entry.credential.check(needed, time.time())
    return entry


def _with_key(search: Search, credential: Credential) -> Entry:
    grant = credential.grant
    if grant.peer is None:
        return Entry(search=search, credential=credential, key=credential.bearer_key())
    for path in (search.machine(), *(state / IDENTITY_NAME for state in search.states())):
        if peer_in(path) == grant.peer:
            return Entry(search=search, credential=credential, key=load_or_create(path), identity_file=path)
    here = load_or_create(search.machine()).peer
    raise NotInvited(
        f"this invitation is for peer {grant.peer}, this machine is peer {here}; use it on that machine, "
        f"or ask the run's owner for `swarm invite … --for {here}`"
    )


def _with_key_or_none(search: Search, credential: Credential) -> Entry | None:
    try:
        return _with_key(search, credential)
    except NotInvited as error:
        logger.debug("a saved membership is not for this machine reason=%s", error)
        return None


def _saved(states: Iterable[Path], run: RunId) -> list[Credential]:
    found = []
    for state in states:
        try:
            credential = load_credential(state)
        except (BadConfig, NotInvited) as error:
            logger.warning("%s", error)
            continue
        if credential is not None and credential.run == run:
            found.append(credential)
    return found


def _rank(credential: Credential) -> tuple[bool, int, int]:
    """Valid ones first, then by what they allow, then by how long."""
    grant = credential.grant
    return grant.expires_at > time.time(), list(Role).index(grant.role), grant.expires_at
