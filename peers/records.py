"""What a peer announces: frozen records, parsed or refused, in an envelope signed by the peer's libp2p key.

The envelope is msgpack `[kind, payload, public key, signature]`; the signature covers kind and payload, so that a
record cannot be replayed as another kind. Everything from outside is bounded before it is parsed. No DHT here.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias, TypeVar

import msgpack

from blocks.errors import BadSpan
from blocks.spans import MAX_BLOCKS, Span
from peers.config import MAX_MULTIADDR_CHARS, MULTIADDR
from peers.errors import BadMessage, BadRecord
from peers.identity import Identity, peer_id_of, verify
from peers.network import PeerId
from peers.record_fields import matching, number, printable
from peers.streams.fields import (
    BOOLEAN,
    NUMBER,
    Codec,
    exactly,
    from_body,
    integer,
    optional,
    raw,
    several,
    to_body,
    wired,
)

MAX_SEALED_BYTES = 4096
MAX_LIFE_SECONDS = 3600.0  # a record that claims to live longer is refused: nobody could correct it
MAX_ADDRESSES = 4
DIGEST_BYTES = 8
MAX_KEEPINGS = 48
MAX_PUBLISHED = 16  # adapters that a run serves beside the one that it trains
MAX_NICKNAME_CHARS = 48
MAX_GIVEN_TOKENS = 2**53  # what JavaScript can count to, and more than any peer has done
ROLES = ("host", "holder", "trainer", "client", "keeper")  # a holder serves itself alone: nobody can dial it
AWAY = ("", "hand", "hours", "leaving", "moving")  # why a peer that has a span serves nobody now; empty while it does

_DOMAIN = b"swarmtune record 1\0"
_MAX_ROUND = 2**40
_MAX_LABELS_BYTES = 3000
_MAX_WINDOW_SECONDS = 60.0
_PEER_ID = re.compile(r"[1-9A-HJ-NP-Za-km-z]{40,64}")


def _read_span(value: object) -> Span:
    match value:
        case [int(start), int(end)] if type(start) is int and type(end) is int:
            try:
                return Span(start, end)
            except BadSpan as error:
                raise ValueError from error
    raise ValueError


Proposal = tuple[int, float, float]
"""(round, DHT time at which it begins, seconds until its group closes)."""


def _read_proposal(value: object) -> Proposal:
    match value:
        case [int(number), float(begin_at), float(window)] if (
            0 <= number <= _MAX_ROUND and math.isfinite(begin_at) and 0 < window <= _MAX_WINDOW_SECONDS
        ):
            return number, begin_at, window
    raise ValueError


@dataclass(frozen=True, slots=True)
class Keeping:
    """Units that a peer stores without holding them: of consecutive blocks, as of `round`; 8 bytes of digest each."""

    span: Span
    round: int
    digests: bytes


def _read_keeping(value: object) -> Keeping:
    match value:
        case [[*span], int(number), bytes(digests)] if type(number) is int and 0 <= number <= _MAX_ROUND:
            keeping = Keeping(_read_span(span), number, digests)
            if len(digests) == DIGEST_BYTES * len(keeping.span):
                return keeping
    raise ValueError


def _read_protocol(value: object) -> tuple[int, int]:
    match value:
        case [int(low), int(high)] if 0 <= low <= high <= 10_000:
            return low, high
    raise ValueError


_RUN = matching("a run's id", r"[A-Za-z0-9_.-]{1,64}", 64)
_PEER: Codec[PeerId] = Codec("a peer id", matching("", _PEER_ID.pattern, 64).read, str)  # type: ignore[arg-type]
_SPAN = Codec("a span", _read_span, lambda span: [span.start, span.end])
_ROUND = integer(0, _MAX_ROUND)
_KEEPING = Codec(
    "[span, round, digests]", _read_keeping, lambda kept: [[kept.span.start, kept.span.end], kept.round, kept.digests]
)
_GIVEN = integer(0, MAX_GIVEN_TOKENS)
_SPEED = number(0, 1e9)
_SECONDS = number(0, 1e6)
_MOMENT = number(0, 1e11)
_ADDRESS = matching("an address", MULTIADDR.pattern, MAX_MULTIADDR_CHARS)
_ROLE = matching("a role", "|".join(ROLES), 16)
_AWAY = matching("why a peer serves nobody", "|".join(AWAY), 16)


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerRecord:
    """What a host holds and how fast it is. `protocol` is the lowest and highest version that it speaks.

    `away` is one of `AWAY`: a peer that is away has not the role of a host. Times are DHT times in seconds.

    For placement (see standing.Standing): `capacity` is the most blocks that it can hold, 0 if it says nothing and so
    stays where it is; `pinned`, that a person chose its span; `since`, when it took its span or promised the one in
    `moves_to`, which it is going to hold instead or, without the role of a host, is loading; `moved`, that it came
    there by a move. A newcomer that loads its first span gives that as `span`, too.

    `served_tokens` and `trained_tokens` are what it says it has done since its identity's first start; nobody checks
    that, and no rule goes by it. `adapters` are marks of the published adapters of which it has the units of all of
    its span; a host serves them.
    """

    kind: ClassVar[str] = "peer"
    run: str = wired(_RUN)
    peer: PeerId = wired(_PEER)
    span: Span = wired(_SPAN)
    tokens_per_second: float = wired(_SPEED)
    backward_tokens_per_second: float = wired(_SPEED)
    queue_seconds: float = wired(_SECONDS)
    round: int = wired(_ROUND)
    cache_free_bytes: int = wired(integer(0, 2**60))
    addresses: tuple[str, ...] = wired(several(_ADDRESS, MAX_ADDRESSES))
    protocol: tuple[int, int] = wired(Codec("a lowest and a highest version", _read_protocol, list))
    software: str = wired(printable(48))
    dtype: str = wired(matching("a dtype", "[a-z0-9_]{1,16}", 16))
    nickname: str = wired(printable(MAX_NICKNAME_CHARS), default="")
    roles: tuple[str, ...] = wired(several(_ROLE, len(ROLES)), default=("host",))
    away: str = wired(_AWAY, default="")
    capacity: int = wired(integer(0, MAX_BLOCKS), default=0)
    pinned: bool = wired(BOOLEAN, default=False)
    since: float = wired(_MOMENT, default=0.0)
    moved: bool = wired(BOOLEAN, default=False)
    moves_to: Span | None = wired(optional(_SPAN), default=None)
    served_tokens: int = wired(_GIVEN, default=0)
    trained_tokens: int = wired(_GIVEN, default=0)
    adapters: tuple[bytes, ...] = wired(several(exactly(DIGEST_BYTES), MAX_PUBLISHED), default=())
    expires_at: float = wired(_MOMENT)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgressRecord:
    """How far a host is. `samples` count since its last round; `digests` has 8 bytes for each block of `span`, or none.

    `proposal` is (round, DHT time, seconds) when this peer proposes to begin that round then, and to close its group
    so many seconds later at the latest. `keeps` are others' units that it stores (see keeping.py). `away` is one of
    `AWAY`: a peer that is away comes to no round. Who is `behind_nat` can be called only by those whom it has dialled.
    """

    kind: ClassVar[str] = "progress"
    run: str = wired(_RUN)
    peer: PeerId = wired(_PEER)
    span: Span = wired(_SPAN)
    round: int = wired(_ROUND)
    samples: int = wired(integer(0, 2**53))
    total_samples: int = wired(integer(0, 2**53))
    digests: bytes = wired(raw(DIGEST_BYTES * MAX_BLOCKS), default=b"")
    proposal: Proposal | None = wired(
        optional(Codec("a round, a moment and a window", _read_proposal, list)), default=None
    )
    keeps: tuple[Keeping, ...] = wired(several(_KEEPING, MAX_KEEPINGS), default=())
    away: str = wired(_AWAY, default="")
    behind_nat: bool = wired(BOOLEAN, default=False)
    expires_at: float = wired(_MOMENT)

    def digest_of(self, block: int) -> bytes | None:
        """The digest of one block's unit, where this record carries it."""
        if block not in self.span or not self.digests:
            return None
        return _digest_at(self.digests, block - self.span.start)

    def kept(self, block: int) -> tuple[int, bytes] | None:
        """Round and digest of one block's unit, where this peer says that it stores it without holding it."""
        for keeping in self.keeps:
            if block in keeping.span:
                return keeping.round, _digest_at(keeping.digests, block - keeping.span.start)
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerRecord:
    """How a trainer is doing. Losses are mean cross entropy per token in nats. `evaluated` is the last round with
    which it has measured held-out rows; None where it has none, or measures no more. Who has `left` trains no more: the
    DHT keeps what expires last, so a goodbye is a newer record.
    """

    kind: ClassVar[str] = "trainer"
    run: str = wired(_RUN)
    peer: PeerId = wired(_PEER)
    nickname: str = wired(printable(MAX_NICKNAME_CHARS), default="")
    loss: float = wired(number(0, 1e6))
    eval_loss: float | None = wired(optional(number(0, 1e6)), default=None)
    tokens_per_second: float = wired(_SPEED)
    step: int = wired(integer(0, _MAX_ROUND))
    round: int = wired(_ROUND)
    evaluated: int | None = wired(optional(_ROUND), default=None)
    left: bool = wired(BOOLEAN, default=False)
    expires_at: float = wired(_MOMENT)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRecord:
    """What a trainer's held-out rows give with the adapter of `round`: `loss` summed over `tokens`, in nats.

    Of rows with a label: `label_set` names the labels among which they were chosen, `labels` has the counts, packed.
    Both are empty where there are none. What sums can be is for the reader to judge.
    """

    kind: ClassVar[str] = "evaluation"
    run: str = wired(_RUN)
    peer: PeerId = wired(_PEER)
    round: int = wired(_ROUND)
    loss: float = wired(NUMBER)
    tokens: int = wired(integer(1, 2**53))
    label_set: bytes = wired(raw(DIGEST_BYTES), default=b"")
    labels: bytes = wired(raw(_MAX_LABELS_BYTES), default=b"")
    expires_at: float = wired(_MOMENT)


Record: TypeAlias = PeerRecord | ProgressRecord | TrainerRecord | EvaluationRecord
R = TypeVar("R", bound=Record)


class SealCache:
    """Remembers by hash which blobs were well signed: a record is read every few seconds and verified once."""

    def __init__(self, size: int = 4096) -> None:
        self._size = size
        self._known: OrderedDict[bytes, None] = OrderedDict()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._known

    def add(self, digest: bytes) -> None:
        """Remember a blob; forgets the oldest when full."""
        self._known[digest] = None
        if len(self._known) > self._size:
            self._known.popitem(last=False)


def seal(identity: Identity, kind: str, payload: Mapping[str, object], *, most: int = MAX_SEALED_BYTES) -> bytes:
    """Sign `payload` (plain msgpack values) as this peer's word of `kind`.

    Raises:
        BadRecord: the result would be larger than `most` bytes.
    """
    packed = bytes(msgpack.packb(dict(payload)))
    signature = identity.sign(_signed_part(kind, packed))
    blob = bytes(msgpack.packb([kind, packed, identity.public_key, signature]))
    if len(blob) > most:
        raise BadRecord(f"a {kind} record takes {len(blob)} bytes; at most {most} fit, shorten names or addresses")
    return blob


def open_sealed(
    blob: bytes, kind: str, *, most: int = MAX_SEALED_BYTES, cache: SealCache | None = None
) -> tuple[PeerId, Mapping[str, object]]:
    """Who sealed `blob`, and what it says. About 0.1 ms, less for a blob that `cache` knows.

    Raises:
        BadRecord: too large, malformed, of another kind, or wrongly signed.
    """
    if len(blob) > most:
        raise BadRecord(f"a {kind} record of {len(blob)} bytes is refused; at most {most} are allowed")
    match _unpack(blob, kind):
        case [str(found), bytes(packed), bytes(public_key), bytes(signature)] if found == kind:
            peer = peer_id_of(public_key)
            digest = hashlib.sha256(blob).digest()
            if cache is None or digest not in cache:
                if not verify(peer, public_key, _signed_part(kind, packed), signature):
                    raise BadRecord(f"a {kind} record that names {peer} has a wrong signature")
                if cache is not None:
                    cache.add(digest)
            payload = _unpack(packed, kind)
            if isinstance(payload, dict) and all(isinstance(key, str) for key in payload):
                return peer, payload
    raise BadRecord(f"a {kind} record is malformed")


def seal_record(identity: Identity, record: Record) -> bytes:
    """Sign a record; refuses what readers would refuse, so that mistakes show where they are made.

    Raises:
        BadRecord: another peer's record, a field out of range, or larger than 4 kB.
    """
    if record.peer != identity.peer:
        raise BadRecord(f"peer {identity.peer} cannot sign a record of {record.peer}")
    check_record(record)
    return seal(identity, record.kind, to_body(record))


def check_record(record: Record) -> None:
    """Refuse a record that readers would refuse.

    Raises:
        BadRecord: a field is out of range; the message names it.
    """
    _parse(type(record), to_body(record))


def open_record(blob: bytes, record_type: type[R], *, run: str, now: float, cache: SealCache | None = None) -> R:
    """The record in a signed envelope.

    Raises:
        BadRecord: malformed, a field out of range, wrongly signed, of another peer or run, expired, or nearly immortal.
    """
    signer, payload = open_sealed(blob, record_type.kind, cache=cache)
    record = _parse(record_type, payload)
    if record.peer != signer:
        raise BadRecord(f"a {record.kind} record of {record.peer} is signed by {signer}")
    if record.run != run:
        raise BadRecord(f"a {record.kind} record of run {record.run} was found in run {run}")
    check_life(record.expires_at, now)
    return record


def check_life(expires_at: float, now: float) -> None:
    """Refuse what is over, and what would outlive its hour.

    Raises:
        BadRecord: the record has expired, or expires too late.
    """
    if expires_at <= now:
        raise BadRecord(f"a record expired {now - expires_at:.0f} s ago")
    if expires_at > now + MAX_LIFE_SECONDS:
        raise BadRecord(f"a record claims to live for {expires_at - now:.0f} s; the most is {MAX_LIFE_SECONDS:.0f}")


def is_peer_id(text: str) -> bool:
    """Whether `text` looks like a base58 peer id."""
    return _PEER_ID.fullmatch(text) is not None


def _parse(record_type: type[R], payload: Mapping[str, object]) -> R:
    try:
        record = from_body(record_type, f"{record_type.kind} record", payload)
    except (BadMessage, TypeError) as error:
        raise BadRecord(str(error)) from error
    if isinstance(record, ProgressRecord) and len(record.digests) not in (0, DIGEST_BYTES * len(record.span)):
        raise BadRecord(f"a progress record of {len(record.span)} blocks has {len(record.digests)} bytes of digests")
    return record


def _digest_at(joined: bytes, place: int) -> bytes:
    return joined[place * DIGEST_BYTES : (place + 1) * DIGEST_BYTES]


def _signed_part(kind: str, packed: bytes) -> bytes:
    return _DOMAIN + kind.encode() + b"\0" + packed


def _unpack(data: bytes, kind: str) -> object:
    try:
        value: object = msgpack.unpackb(data, strict_map_key=True)
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        raise BadRecord(f"a {kind} record is not valid msgpack") from error
    return value
