"""Who is no longer let into a private run: the owner's signed list, with a number that only grows. Pure.

A peer is named by a short hash and by when it was revoked, so that the owner may invite it again later. An entry is
kept for as long as a membership that was signed before it may last.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from peers.errors import BadRecord
from peers.network import PeerId
from peers.owner_list import MAX_LIST_BYTES, malformed, open_list, seal_list
from peers.private.membership import MAX_LIFE_DAYS, SERIAL_BYTES, Membership

_WHAT = "those revoked"
_DOMAIN = b"swarmtune revoked 1\0"
_HASH_BYTES = 16
_MAX_MOMENT = 2**40
_KEPT_SECONDS = (MAX_LIFE_DAYS + 1) * 86400


@dataclass(frozen=True, kw_only=True, slots=True)
class Revocations:
    """A run's list: hashes of peer ids and serials of grants, each with the unix second at which it was revoked.

    `blob` is the list as its owner signed it; empty for one that nobody has signed yet.
    """

    run: str
    number: int = 0
    peers: Mapping[bytes, int] = field(default_factory=dict)
    serials: Mapping[bytes, int] = field(default_factory=dict)
    blob: bytes = field(default=b"", compare=False, repr=False)

    def reason(self, membership: Membership) -> str:
        """Why `membership` does not count any more, or the empty string."""
        if membership.grant.serial in self.serials:
            serial = membership.grant.serial.hex()
            return f"its invitation {serial} was revoked by the run's owner; only a new invitation lets it in"
        for peer in {membership.peer, membership.grant.peer}:
            if peer is not None and self.peers.get(_hash(peer), -1) >= membership.grant.not_before:
                return f"the membership of {peer} was revoked by the run's owner; only a new invitation lets it in"
        return ""

    def with_peer(self, peer: PeerId, now: int) -> Revocations:
        """The next list, in which all that was granted to `peer` until `now` is void."""
        return replace(self._next(now), peers={**self._kept(self.peers, now), _hash(peer): now})

    def with_serial(self, serial: bytes, now: int) -> Revocations:
        """The next list, in which the grant `serial` is void, whoever uses it."""
        return replace(self._next(now), serials={**self._kept(self.serials, now), serial: now})

    def revoked_at(self, peer: PeerId) -> int:
        """When `peer` was revoked last, or -1: a new grant for it must begin later."""
        return self.peers.get(_hash(peer), -1)

    def _next(self, now: int) -> Revocations:
        peers, serials = self._kept(self.peers, now), self._kept(self.serials, now)
        return Revocations(run=self.run, number=self.number + 1, peers=peers, serials=serials)

    @staticmethod
    def _kept(entries: Mapping[bytes, int], now: int) -> dict[bytes, int]:
        return {name: at for name, at in entries.items() if at > now - _KEPT_SECONDS}


def sign_revocations(revoked: Revocations, owner: Ed25519PrivateKey) -> bytes:
    """The list as the owner's word, for `open_revocations`.

    Raises:
        BadRecord: it does not fit into 4 kB.
    """
    lists = [[[name, at] for name, at in sorted(entries.items())] for entries in (revoked.peers, revoked.serials)]
    blob = seal_list([revoked.run, revoked.number, *lists], owner, _DOMAIN)
    if len(blob) > MAX_LIST_BYTES:
        raise BadRecord(
            f"the list of those revoked takes {len(blob)} bytes, at most {MAX_LIST_BYTES} fit; revoke the serial of"
            " an --anyone invitation at once instead of its peers, or begin a new run from this one's adapter"
        )
    return blob


def open_revocations(blob: bytes, *, owner: bytes, run: str) -> Revocations:
    """The list in `blob`, from wherever it came.

    Raises:
        BadRecord: malformed, too large, of another run, or not signed by its owner.
    """
    match open_list(blob, owner, _DOMAIN, _WHAT):
        case [str(found), int(number), [*peers], [*serials]] if found == run and _is_count(number):
            return Revocations(
                run=run,
                number=number,
                peers=_entries(peers, _HASH_BYTES),
                serials=_entries(serials, SERIAL_BYTES),
                blob=blob,
            )
    raise malformed(_WHAT)


def newest(lists: list[Revocations]) -> Revocations:
    """The one with the greatest number; whoever offers an older one is not listened to."""
    return max(lists, key=lambda one: one.number)


def _entries(found: list[object], size: int) -> dict[bytes, int]:
    entries: dict[bytes, int] = {}
    for entry in found:
        match entry:
            case [bytes(name), int(at)] if len(name) == size and type(at) is int and 0 <= at < _MAX_MOMENT:
                entries[name] = at
                continue
        raise malformed(_WHAT)
    return entries


def _is_count(number: int) -> bool:
    return type(number) is int and 0 <= number < _MAX_MOMENT


def _hash(peer: str) -> bytes:
    return hashlib.sha256(_DOMAIN + peer.encode()).digest()[:_HASH_BYTES]
