"""The votes of one group as they come in, and their bytes. Who may vote on what is checked here. No network."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence

import msgpack

from averaging.config import MAX_GROUP_PEERS
from averaging.errors import BadContribution
from averaging.exchange import UnitClass, Vote
from averaging.rounds import is_decided
from peers.network import PeerId

MAX_VOTE_BYTES = 2**18
MAX_PROBE_BYTES = 2**16
_MAX_CLASSES = 2048
_DIGEST_BYTES = 32


class Ballot:
    """All votes that this peer has seen on its own classes."""

    def __init__(self, me: PeerId, classes: Sequence[UnitClass], mine: Mapping[bytes, Vote]) -> None:
        self._classes = {unit_class.class_id: unit_class for unit_class in classes}
        self._votes: dict[bytes, dict[PeerId, Vote]] = {class_id: {} for class_id in self._classes}
        self._settled = asyncio.Event()
        self.add(me, mine.values())

    def add(self, peer: PeerId, votes: Iterable[Vote]) -> None:
        """Count `peer`'s votes on the classes that both hold. The first word counts; others are ignored."""
        for vote in votes:
            unit_class = self._classes.get(vote.class_id)
            if unit_class is not None and peer in unit_class.holders:
                self._votes[vote.class_id].setdefault(peer, vote)
        if all(is_decided(unit_class, self._votes[key]) for key, unit_class in self._classes.items()):
            self._settled.set()

    async def settled(self) -> None:
        """Wait until no further vote can change anything. The caller sets the deadline."""
        await self._settled.wait()

    def votes(self) -> Mapping[bytes, Mapping[PeerId, Vote]]:
        """What has come so far."""
        return {class_id: dict(votes) for class_id, votes in self._votes.items()}


def pack_votes(group_id: bytes, votes: Iterable[Vote]) -> bytes:
    """Votes on classes of one group as msgpack: [group, [[class, complete, digest, dropped, doubted, probes], ...]]."""
    entries = [
        [vote.class_id, vote.complete, vote.digest, sorted(vote.dropped), sorted(vote.doubted), vote.probes]
        for vote in votes
    ]
    data: bytes = msgpack.packb([group_id, entries])
    return data


def parse_votes(data: bytes) -> tuple[bytes, tuple[Vote, ...]]:
    """The group id and the votes of a message from the wire.

    Raises:
        BadContribution: too long or malformed.
    """
    if len(data) > MAX_VOTE_BYTES:
        raise BadContribution(f"votes of {len(data)} bytes; at most {MAX_VOTE_BYTES}")
    try:
        group_id, entries = msgpack.unpackb(data, max_array_len=_MAX_CLASSES)
        votes = tuple(_vote(*entry) for entry in entries)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise BadContribution("votes are malformed") from error
    if type(group_id) is not bytes or len(group_id) > _DIGEST_BYTES:
        raise BadContribution("votes are malformed")
    return group_id, votes


def _vote(*fields: object) -> Vote:
    match fields:
        case [bytes(key), bool(complete), bytes(digest), list(dropped), list(doubted), bytes(probes)] if (
            len(key) <= _DIGEST_BYTES and len(digest) <= _DIGEST_BYTES and len(probes) <= MAX_PROBE_BYTES
        ):
            return Vote(
                class_id=key,
                complete=complete,
                digest=digest,
                dropped=_accused(dropped),
                doubted=_accused(doubted),
                probes=probes,
            )
    raise ValueError("not a vote")


def _accused(names: list[object]) -> frozenset[PeerId]:
    if len(names) > MAX_GROUP_PEERS or not all(isinstance(name, str) and len(name) <= 128 for name in names):
        raise ValueError("not peers")
    return frozenset(PeerId(str(name)) for name in names)
