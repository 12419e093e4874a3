"""What lets one person's peers into a private run: the owner's grant, and the key that it was granted to.

As an invitation carries it, and as it lies in a state directory. Which file is whose, and which peer uses it: entry.py.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import msgpack
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from peers.errors import BadMembership
from peers.network import PeerId
from peers.private.membership import MAX_LIFE_DAYS, SERIAL_BYTES, Grant, Role, open_grant, sign_grant
from swarm.errors import BadConfig, NotInvited
from swarm.run import RunId, public_bytes, run_id_from

MEMBERSHIP_NAME = "membership"  # in a state directory, readable by its owner alone
OWN_DAYS = 3650  # of peers that are started with the owner's key
DAY_SECONDS = 86400
_MAX_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """A grant, with what is needed to check it. `bearer` is the private key of a grant to whoever has it, 32 bytes.

    The run's id is a hash of `owner` (public key), `name` and `nonce`: so an invitation cannot name another's run.

    Raises:
        NotInvited: the grant is not one, or not this owner's, or the bearer's key is not the one that was granted.
    """

    owner: bytes
    name: str
    nonce: str
    granted: bytes
    bearer: bytes = b""

    def __post_init__(self) -> None:
        grant = self.grant
        if grant.peer is None:
            if len(self.bearer) != 32 or public_bytes(self.bearer_key()) != grant.bearer:
                raise NotInvited("this invitation's key is not the one that the run's owner granted; ask for a new one")
        elif self.bearer:
            raise NotInvited("this invitation is malformed; ask for a new one")

    @property
    def run(self) -> RunId:
        """The run that it is for."""
        return run_id_from(self.owner, nonce=self.nonce, name=self.name)

    @property
    def grant(self) -> Grant:
        """What the owner granted."""
        try:
            return open_grant(self.granted, owner=self.owner, run=self.run)
        except BadMembership as error:
            raise NotInvited(f"this invitation cannot be used: {error}; ask the run's owner for a new one") from None

    def bearer_key(self) -> Ed25519PrivateKey:
        """The key of whoever has the invitation."""
        return Ed25519PrivateKey.from_private_bytes(self.bearer)

    def check(self, needed: Role, now: float) -> None:
        """Refuse one whose time is over, or whose role does not do.

        Raises:
            NotInvited: with what to do.
        """
        grant = self.grant
        if now >= grant.expires_at:
            days = (now - grant.expires_at) / DAY_SECONDS
            raise NotInvited(f"this invitation expired {days:.1f} days ago; ask the run's owner for a new one")
        if not grant.role.covers(needed):
            raise NotInvited(
                f"this invitation is for a {grant.role}, this command needs one for a {needed}; "
                f"ask the run's owner for `swarm invite … --role {needed}`"
            )

    def pack(self) -> list[object]:
        """As plain values."""
        return [self.owner, self.name, self.nonce, self.granted, self.bearer]


def credential_from(value: object) -> Credential:
    """The reverse of `Credential.pack`, for values from anywhere.

    Raises:
        NotInvited: malformed, or not the word of the owner that it names.
    """
    match value:
        case [bytes(owner), str(name), str(nonce), bytes(granted), bytes(bearer)] if len(owner) == 32:
            if len(nonce) == 32 and set(nonce) <= set("0123456789abcdef"):
                return Credential(owner=owner, name=name, nonce=nonce, granted=granted, bearer=bearer)
    raise NotInvited("this invitation is malformed; copy the whole of it again, or ask for a new one")


def save_credential(directory: Path, credential: Credential) -> None:
    """Leave it in a state directory, readable by its owner alone, replacing an older one whole.

    Raises:
        BadConfig: it cannot be written.
    """
    path, draft = directory / MEMBERSHIP_NAME, directory / f".{MEMBERSHIP_NAME}.{os.getpid()}"
    try:
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(msgpack.packb(credential.pack()))
        draft.replace(path)
    except OSError as error:
        raise BadConfig(f"{path} cannot be written ({error.strerror}); free space or give another --state") from None


def load_credential(directory: Path) -> Credential | None:
    """What `save_credential` left, if anything.

    Raises:
        BadConfig: it cannot be read.
        NotInvited: it is malformed.
    """
    path = directory / MEMBERSHIP_NAME
    try:
        with path.open("rb") as file:
            return credential_from(msgpack.unpackb(file.read(_MAX_BYTES)))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BadConfig(f"{path} cannot be read ({error.strerror}); check its owner") from None
    except (ValueError, RecursionError, msgpack.UnpackException):
        raise NotInvited(f"{path} is torn; join once more by the invitation") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnedRun:
    """A private run whose owner's key is here."""

    key: Ed25519PrivateKey
    name: str
    nonce: str

    @property
    def run(self) -> RunId:
        """Its id."""
        return run_id_from(public_bytes(self.key), nonce=self.nonce, name=self.name)

    def admit(self, peer: PeerId | None, role: Role, *, begins_at: int, days: float) -> Credential:
        """Sign a grant for `peer`, or for whoever gets the credential. `begins_at` is in unix seconds.

        Raises:
            BadConfig: it would last too long, or for no time.
        """
        if not 0 < days <= MAX_LIFE_DAYS:
            raise BadConfig(
                f"an invitation for {days:g} days cannot be made; use more than 0 and at most {MAX_LIFE_DAYS}"
            )
        bearer = Ed25519PrivateKey.generate() if peer is None else None
        grant = Grant(
            run=self.run,
            role=role,
            not_before=begins_at,
            expires_at=begins_at + max(1, int(days * DAY_SECONDS)),
            serial=secrets.token_bytes(SERIAL_BYTES),
            peer=peer,
            bearer=b"" if bearer is None else public_bytes(bearer),
        )
        return Credential(
            owner=public_bytes(self.key),
            name=self.name,
            nonce=self.nonce,
            granted=sign_grant(grant, self.key),
            bearer=b"" if bearer is None else bearer.private_bytes_raw(),
        )
