"""The votes of one group as they come in, and their signed bytes. Who may vote on what is checked here. No network."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgpack

from averaging.config import MAX_GROUP_PEERS
from averaging.errors import BadContribution
from averaging.exchange import UnitClass, Vote
from averaging.rounds import is_decided, is_judged
from averaging.signing import Signer
from peers.identity import peer_id_of, verify
from peers.network import PeerId

MAX_VOTE_BYTES = 2**18
MAX_PROBE_BYTES = 2**16
_MAX_CLASSES = 2048
_JUDGE_SECONDS = 1.0
_DIGEST_BYTES = 32
_CONTEXT = b"swarmtune votes 1\0"  # a signature over this can never pass for one over anything else


@dataclass(frozen=True, kw_only=True, slots=True)
class Word:
    """What one peer has to say of its classes in one round; `data` is that as signed bytes, for others to hand on."""

    peer: PeerId
    group_id: bytes
    votes: tuple[Vote, ...]
    data: bytes


class Ballot:
    """All votes that this peer has heard on its own classes, and the words that it hands on.

    Only the words that the `members` of the group have said in it are kept: one of another round, handed on once more,
    would else stand in for the peer's own. Those `behind_nat` cannot call each other: each tells its
    word to whom it can reach, and hears there what the others have said.
    """

    def __init__(
        self,
        group_id: bytes,
        classes: Sequence[UnitClass],
        members: Collection[PeerId],
        behind_nat: Collection[PeerId] = (),
    ) -> None:
        self._group_id = group_id
        self._classes = {unit_class.class_id: unit_class for unit_class in classes}
        self._votes: dict[bytes, dict[PeerId, Vote]] = {class_id: {} for class_id in self._classes}
        self._members, self._behind_nat = frozenset(members), frozenset(behind_nat)
        self._words: dict[PeerId, Word] = {}
        self._settled, self._judged, self._heard = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._look()

    def hear(self, word: Word) -> None:
        """Count a peer's votes on the classes that both hold. Its first word counts; others are ignored."""
        if word.group_id != self._group_id or word.peer not in self._members or word.peer in self._words:
            return
        self._words[word.peer] = word
        for vote in word.votes:
            unit_class = self._classes.get(vote.class_id)
            if unit_class is not None and word.peer in unit_class.holders:
                self._votes[vote.class_id].setdefault(word.peer, vote)
        self._look()
        self._heard.set()
        self._heard = asyncio.Event()

    async def settled(self) -> None:
        """Wait until no further vote can change what becomes of the classes; and where one holder alone has said no, a
        moment for the others' votes, which say whether it is the only one. The caller sets the deadline.
        """
        await self._settled.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_JUDGE_SECONDS):
                await self._judged.wait()

    def votes(self) -> Mapping[bytes, Mapping[PeerId, Vote]]:
        """What has come so far."""
        return {class_id: dict(votes) for class_id, votes in self._votes.items()}

    async def words(self, peer: PeerId, seconds: float) -> AsyncIterator[bytes]:
        """What the others have said, and what they say within `seconds` from now: for members behind NAT."""
        if peer not in self._behind_nat:
            return
        until = asyncio.get_running_loop().time() + seconds
        told = {peer}
        while True:
            heard = self._heard
            for word in [word for who, word in self._words.items() if who not in told]:
                told.add(word.peer)
                yield word.data
            try:
                async with asyncio.timeout_at(until):
                    await heard.wait()
            except TimeoutError:
                return

    def _look(self) -> None:
        if all(is_decided(unit_class, self._votes[key]) for key, unit_class in self._classes.items()):
            self._settled.set()
        if all(is_judged(unit_class, self._votes[key]) for key, unit_class in self._classes.items()):
            self._judged.set()


def word_of(group_id: bytes, votes: Iterable[Vote], signer: Signer) -> Word:
    """This peer's votes on its classes of one group, signed.

    Msgpack [body, public key, signature]; body: [group, [[class, complete, digest, dropped, doubted, probes], ...]].
    """
    said = tuple(votes)
    entries = [
        [vote.class_id, vote.complete, vote.digest, sorted(vote.dropped), sorted(vote.doubted), vote.probes]
        for vote in said
    ]
    body: bytes = msgpack.packb([group_id, entries])
    data: bytes = msgpack.packb([body, signer.public_key, signer.sign(_CONTEXT + body)])
    return Word(peer=signer.peer, group_id=group_id, votes=said, data=data)


def parse_word(data: bytes) -> Word:
    """What a peer says, from the wire: from itself, or handed on.

    Raises:
        BadContribution: too long, malformed, or not signed by the key that comes with it.
    """
    if len(data) > MAX_VOTE_BYTES:
        raise BadContribution(f"votes of {len(data)} bytes; at most {MAX_VOTE_BYTES}")
    try:
        body, public_key, signature = msgpack.unpackb(data, max_array_len=3)
        if not all(type(part) is bytes for part in (body, public_key, signature)):
            raise BadContribution("votes are malformed")
        peer = peer_id_of(public_key)
        if not verify(peer, public_key, _CONTEXT + body, signature):
            raise BadContribution(f"votes that name {peer} have a wrong signature")
        group_id, entries = msgpack.unpackb(body, max_array_len=_MAX_CLASSES)
        votes = tuple(_vote(*entry) for entry in entries)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise BadContribution("votes are malformed") from error
    if type(group_id) is not bytes or len(group_id) > _DIGEST_BYTES:
        raise BadContribution("votes are malformed")
    return Word(peer=peer, group_id=group_id, votes=votes, data=data)


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
