"""Values of ours as fields of messages: spans, units, microbatches, digests, places, timings. Read or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address

from blocks.errors import BadSpan
from blocks.snapshots import DIGEST_BYTES
from blocks.spans import MAX_BLOCKS, Span, UnitId, parse_unit
from blocks.training.ledger import REMEMBERED_IDS, MicrobatchId
from peers.network import PeerId
from peers.streams.fields import NUMBER, Codec, integer, raw, text

MAX_STEP = 1 << 40
MAX_SECONDS = 3600.0
TOKEN_BYTES = 16


@dataclass(frozen=True, slots=True)
class Place:
    """A session or a lane at one peer, by the name that its owner gave it."""

    peer: PeerId
    name: str


@dataclass(frozen=True, slots=True)
class Timing:
    """What one place of a chain took for a piece of work: to compute it, its queue included, and to pass it on."""

    name: str
    seconds: float
    link_seconds: float


@dataclass(frozen=True, slots=True)
class Offer:
    """One version of a unit, and how many bytes its tensors take."""

    unit: UnitId
    round: int
    weight: float
    digest: bytes
    num_bytes: int

    @property
    def version(self) -> tuple[int, float, bytes]:
        """See blocks.unit_state.UnitState.version."""
        return self.round, self.weight, self.digest


def _read_span(value: object) -> Span:
    if not isinstance(value, list) or len(value) != 2 or not all(type(item) is int for item in value):
        raise ValueError
    try:
        return Span(value[0], value[1])
    except BadSpan as error:
        raise ValueError from error


def _read_unit(value: object) -> UnitId:
    if not isinstance(value, str):
        raise ValueError
    try:
        parse_unit(value)
    except BadSpan as error:
        raise ValueError from error
    return UnitId(value)


def _read_microbatch(value: object) -> MicrobatchId:
    if not isinstance(value, list) or len(value) != 4:
        raise ValueError
    trainer, life, step, index = value
    return MicrobatchId(
        trainer=NAME.read(trainer), life=COUNT.read(life), step=COUNT.read(step), index=_INDEX.read(index)
    )


def _read_digests(value: object) -> Mapping[int, bytes]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError
    first, joined = value
    if type(first) is not int or not isinstance(joined, bytes) or len(joined) % DIGEST_BYTES:
        raise ValueError
    count = len(joined) // DIGEST_BYTES
    if first < 0 or first + count > MAX_BLOCKS:
        raise ValueError
    return {first + i: joined[i * DIGEST_BYTES : (i + 1) * DIGEST_BYTES] for i in range(count)}


def _write_digests(digests: Mapping[int, bytes]) -> object:
    # Blocks of a span are consecutive, so the first number names them all.
    return [min(digests, default=0), b"".join(digests[block] for block in sorted(digests))]


def _read_place(value: object) -> Place:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError
    return Place(PeerId(NAME.read(value[0])), NAME.read(value[1]))


def _read_timing(value: object) -> Timing:
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError
    timing = Timing(NAME.read(value[0]), NUMBER.read(value[1]), NUMBER.read(value[2]))
    if not (0 <= timing.seconds <= MAX_SECONDS and 0 <= timing.link_seconds <= MAX_SECONDS):
        raise ValueError
    return timing


def _read_ip(value: object) -> str:
    if not isinstance(value, str) or "%" in value:  # after it comes a zone, which may be any text
        raise ValueError
    return str(ip_address(value))


def _read_token(value: object) -> bytes:
    if not isinstance(value, bytes) or len(value) != TOKEN_BYTES:
        raise ValueError
    return value


def _read_offer(value: object) -> Offer:
    if not isinstance(value, list) or len(value) != 5:
        raise ValueError
    unit, number, weight, digest, num_bytes = value
    offer = Offer(
        _read_unit(unit), COUNT.read(number), NUMBER.read(weight), _SHA256.read(digest), COUNT.read(num_bytes)
    )
    if offer.weight < 0 or len(offer.digest) != 32:
        raise ValueError
    return offer


def _write_offer(offer: Offer) -> object:
    return [offer.unit, offer.round, offer.weight, offer.digest, offer.num_bytes]


NAME = text(64)
COUNT = integer(0, MAX_STEP)
_INDEX = integer(0, REMEMBERED_IDS - 1)  # a host remembers so many of one step, so as to count none twice
_SHA256 = raw(32)
IP: Codec[str] = Codec("an IP address", _read_ip, str)
TOKEN: Codec[bytes] = Codec(f"{TOKEN_BYTES} bytes", _read_token, bytes)
OFFER: Codec[Offer] = Codec("an offer [unit, round, weight, digest, bytes]", _read_offer, _write_offer)
SPAN: Codec[Span] = Codec("a span [start, end]", _read_span, lambda span: [span.start, span.end])
UNIT: Codec[UnitId] = Codec("a unit id", _read_unit, str)
PLACE: Codec[Place] = Codec("a place [peer, name]", _read_place, lambda place: [place.peer, place.name])
MICROBATCH: Codec[MicrobatchId] = Codec(
    "a microbatch id [trainer, life, step, index]", _read_microbatch, lambda m: [m.trainer, m.life, m.step, m.index]
)
DIGESTS: Codec[Mapping[int, bytes]] = Codec("digests of consecutive blocks", _read_digests, _write_digests)
TIMING: Codec[Timing] = Codec(
    "a timing [name, seconds, seconds]", _read_timing, lambda t: [t.name, t.seconds, t.link_seconds]
)
