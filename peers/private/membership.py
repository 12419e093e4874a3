"""Who is let into a private run: memberships signed by its owner, parsed or refused. Pure: no clock, no network.

A membership is what the owner grants, `[format, grant, signature]`, to one peer id or to whoever holds a key (a bearer
invitation). Where the peer is another than the one granted, a fourth part says that the grant's own key let it in:
`[peer, public key, signature]`. So all of it can be checked by anybody who knows the owner's public key.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import msgpack
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from peers.errors import BadMembership
from peers.identity import verify
from peers.network import PeerId
from peers.records import is_peer_id

MAX_MEMBERSHIP_BYTES = 1024
MAX_LIFE_DAYS = 3660
SERIAL_BYTES = 8
SKEW_SECONDS = 5  # by which the clocks of honest peers may differ

_FORMAT = 1
_GRANT_DOMAIN = b"swarmtune membership 1\0"
_PASS_DOMAIN = b"swarmtune member lets in 1\0"
_MAX_MOMENT = 2**40
_MAX_RUN_CHARS = 64


class Role(StrEnum):
    """What a member may do; each may do all that those before it may."""

    CLIENT = "client"
    TRAINER = "trainer"
    HOST = "host"

    def covers(self, needed: Role) -> bool:
        """Whether this role may do what `needed` may."""
        order = list(Role)
        return order.index(self) >= order.index(needed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Grant:
    """What the owner signed: `peer` may take part, or, where that is None, whoever has the private half of `bearer`.

    `bearer` is 32 raw bytes of an ed25519 public key. Moments are unix seconds. `serial` names this grant.
    """

    run: str
    role: Role
    not_before: int
    expires_at: int
    serial: bytes
    peer: PeerId | None = None
    bearer: bytes = b""


@dataclass(frozen=True, kw_only=True, slots=True)
class Membership:
    """A checked membership of `peer`."""

    peer: PeerId
    grant: Grant

    @property
    def role(self) -> Role:
        """What the peer may do."""
        return self.grant.role

    def check_time(self, now: float) -> None:
        """Refuse it before and after its time, by a clock that may be a few seconds off.

        Raises:
            BadMembership: it is not valid at `now` (unix seconds).
        """
        if now < self.grant.not_before - SKEW_SECONDS:
            raise BadMembership(f"its membership begins in {self.grant.not_before - now:.0f} s; check both clocks")
        if now >= self.grant.expires_at + SKEW_SECONDS:
            ago = _ago(now - self.grant.expires_at)
            raise BadMembership(f"its membership expired {ago} ago; ask the run's owner for a new invitation")


class Signer(Protocol):
    """A peer's key, such as `identity.Identity`."""

    @property
    def peer(self) -> PeerId:
        """Whose key it is."""

    @property
    def public_key(self) -> bytes:
        """Its public half, SubjectPublicKeyInfo DER."""

    def sign(self, data: bytes) -> bytes:
        """A signature that `identity.verify` takes."""


def sign_grant(grant: Grant, owner: Ed25519PrivateKey) -> bytes:
    """A membership for the peer of `grant`; for a bearer's, what `let_in_by_bearer` completes."""
    subject = grant.bearer if grant.peer is None else grant.peer
    times = [grant.not_before, grant.expires_at]
    body = bytes(msgpack.packb([grant.run, str(grant.role), *times, grant.serial, subject]))
    return bytes(msgpack.packb([_FORMAT, body, owner.sign(_GRANT_DOMAIN + body)]))


def let_in_by_bearer(granted: bytes, bearer: Ed25519PrivateKey, peer: PeerId) -> bytes:
    """The membership of `peer`, made by whoever holds the key that the owner granted."""
    return _let_in(granted, peer, b"", bearer.sign(_passed(granted, peer)))


def let_in_by_member(granted: bytes, member: Signer, peer: PeerId) -> bytes:
    """The membership of `peer`, another peer of the machine (or person) to whose identity the owner granted it."""
    return _let_in(granted, peer, member.public_key, member.sign(_passed(granted, peer)))


def open_membership(blob: bytes, *, owner: bytes, run: str, peer: PeerId) -> Membership:
    """The membership of `peer` in `run`, whose owner has the public key `owner` (32 bytes). Its time is not checked.

    About 0.2 ms, or 0.3 ms where a member let the peer in.

    Raises:
        BadMembership: malformed, not signed by the owner, of another run, or of another peer.
    """
    granted, grant, passed = _open(blob, owner, run)
    if passed is None:
        if grant.peer != peer:
            raise BadMembership(f"its membership is that of {grant.peer or 'a key'}; each peer needs its own")
        return Membership(peer=peer, grant=grant)
    leaf, public_key, signature = passed
    if leaf != peer:
        raise BadMembership(f"its membership is that of {leaf:.64}; each peer needs its own")
    signed = _passed(granted, peer)
    if grant.peer is not None:
        is_right = verify(grant.peer, public_key, signed, signature)
    else:
        is_right = not public_key and _is_signed(grant.bearer, signed, signature)
    if not is_right:
        raise BadMembership("its membership was not passed on by the one to whom the owner granted it")
    return Membership(peer=peer, grant=grant)


def open_grant(blob: bytes, *, owner: bytes, run: str) -> Grant:
    """What the owner granted, for whoever is going to complete it.

    Raises:
        BadMembership: malformed, not signed by the owner, of another run, or completed already.
    """
    _, grant, passed = _open(blob, owner, run)
    if passed is not None:
        raise BadMembership("this membership was passed on to a peer already; use the invitation")
    return grant


def _open(blob: bytes, owner: bytes, run: str) -> tuple[bytes, Grant, tuple[str, bytes, bytes] | None]:
    """The granted part, what it says, and to whom it was passed on, with what."""
    if len(blob) > MAX_MEMBERSHIP_BYTES:
        raise BadMembership(f"a membership of {len(blob)} bytes is refused; at most {MAX_MEMBERSHIP_BYTES} are allowed")
    parts = _unpack(blob)
    match parts:
        case [int(form), bytes(body), bytes(signature), *rest] if (
            type(form) is int and form == _FORMAT and len(rest) < 2
        ):
            if not _is_signed(owner, _GRANT_DOMAIN + body, signature):
                raise BadMembership("its membership is not signed by this run's owner")
            grant = _grant(body)
            if grant.run != run:
                raise BadMembership(f"its membership is of run {grant.run}, not of {run}")
            granted = bytes(msgpack.packb([form, body, signature]))
            if not rest:
                return granted, grant, None
            match rest[0]:
                case [str(leaf), bytes(public_key), bytes(made)] if is_peer_id(leaf):
                    return granted, grant, (leaf, public_key, made)
    raise BadMembership("its membership is malformed")


def _grant(body: bytes) -> Grant:
    match _unpack(body):
        case [str(run), str(role), int(not_before), int(expires_at), bytes(serial), subject] if (
            0 < len(run) <= _MAX_RUN_CHARS
            and role in list(Role)
            and type(not_before) is type(expires_at) is int
            and 0 <= not_before < expires_at < _MAX_MOMENT
            and len(serial) == SERIAL_BYTES
        ):
            common = Grant(run=run, role=Role(role), not_before=not_before, expires_at=expires_at, serial=serial)
            match subject:
                case str(peer) if is_peer_id(peer):
                    return _replaced(common, peer=PeerId(peer))
                case bytes(bearer) if len(bearer) == 32:
                    return _replaced(common, bearer=bearer)
    raise BadMembership("its membership is malformed")


def _replaced(grant: Grant, *, peer: PeerId | None = None, bearer: bytes = b"") -> Grant:
    return Grant(
        run=grant.run,
        role=grant.role,
        not_before=grant.not_before,
        expires_at=grant.expires_at,
        serial=grant.serial,
        peer=peer,
        bearer=bearer,
    )


def _let_in(granted: bytes, peer: PeerId, public_key: bytes, signature: bytes) -> bytes:
    blob = bytes(msgpack.packb([*msgpack.unpackb(granted), [str(peer), public_key, signature]]))
    if len(blob) > MAX_MEMBERSHIP_BYTES:
        raise BadMembership(
            f"a membership passed on takes {len(blob)} bytes, at most {MAX_MEMBERSHIP_BYTES} are allowed;"
            " use an identity with an RSA key of 2048 bits"
        )
    return blob


def _passed(granted: bytes, peer: PeerId) -> bytes:
    return _PASS_DOMAIN + hashlib.sha256(granted).digest() + peer.encode()


def _is_signed(public_key: bytes, data: bytes, signature: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def _unpack(data: bytes) -> object:
    """msgpack in its one shortest form, so that no two blobs say the same."""
    try:
        value: object = msgpack.unpackb(data, strict_map_key=True)
        is_shortest = msgpack.packb(value) == data
    except (ValueError, RecursionError, OverflowError, TypeError, msgpack.UnpackException):
        raise BadMembership("its membership is malformed") from None
    if not is_shortest:
        raise BadMembership("its membership is malformed")
    return value


def _ago(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 7200 else f"{seconds / 3600:.0f} hours"
