"""What peers say to each other on streams: frozen values, parsed or refused. The bytes are `wire.py`'s business."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from blocks.spans import MAX_BLOCKS, Span, UnitId
from blocks.training.ledger import MicrobatchId
from peers.errors import BadMessage
from peers.streams.fields import BOOLEAN, NUMBER, exactly, from_body, integer, optional, raw, several, text, wired
from peers.streams.traffic import KIND_TRAFFIC, MAX_KINDS, KindTraffic
from peers.streams.values import (
    COUNT,
    DIGESTS,
    IP,
    MICROBATCH,
    NAME,
    OFFER,
    PLACE,
    SPAN,
    TIMING,
    TOKEN,
    UNIT,
    Offer,
    Place,
    Timing,
)

# 1 drove chains hop by hop, 2 brought scaled values to rounds, 3 sent their parts as protobuf, 4 did not sign votes
PROTOCOL_MIN = 5
PROTOCOL_MAX = 5
MAX_BATCH = 4096
MAX_POSITIONS = 1 << 21
MAX_HOPS = 256
MAX_OFFERS = 128
MAX_SAMPLES = 1 << 60
MAX_CONTENT_BYTES = 32 * 1024  # digests of units of a published adapter: of so many blocks, within a frame's header
_CONTENT = exactly(32)


class StreamKind(StrEnum):
    """The streams that a peer serves."""

    TRAIN = "train"
    DECODE = "decode"
    UNITS = "units"
    INFO = "info"


class RefusalCode(StrEnum):
    """Why a peer refused, for code; the reason beside it is for people."""

    VERSION = "version"
    RUN = "run"
    MALFORMED = "malformed"
    SESSION = "session"  # unknown, dropped, or at another position: begin again
    FULL = "full"  # no memory: try another host
    SNAPSHOT = "snapshot"  # the wanted state of the adapter is gone here
    SPAN = "span"  # these blocks are not held here (any more)
    BUSY = "busy"
    INTERNAL = "internal"
    ADAPTER = "adapter"  # this published adapter is not served here
    MEMBER = "member"  # not let into this private run, or not with this role


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello:
    """First on every stream, from both sides. `unix_seconds` shows a clock that is off."""

    kind: ClassVar[str] = "hello"
    run: str = wired(NAME)
    low: int = wired(integer(0, 1 << 16), default=PROTOCOL_MIN)
    high: int = wired(integer(0, 1 << 16), default=PROTOCOL_MAX)
    software: str = wired(NAME, default="")
    unix_seconds: float = wired(NUMBER, default=0.0)


def common_version(ours: Hello, theirs: Hello) -> int | None:
    """The highest protocol version that both speak, or None."""
    version = min(ours.high, theirs.high)
    return version if version >= max(ours.low, theirs.low) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """No, and why."""

    kind: ClassVar[str] = "refusal"
    code: str = wired(text(32))
    reason: str = wired(text(500))


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """Yes; tensors, if the question asks for some, are the answer. `timings` are of this place and those behind it."""

    kind: ClassVar[str] = "done"
    timings: tuple[Timing, ...] = wired(several(TIMING, MAX_HOPS), default=())


@dataclass(frozen=True, kw_only=True, slots=True)
class Broken:
    """The answer of a host that could not pass work on: at `place` it ended, by that host's refusal or its silence."""

    kind: ClassVar[str] = "broken"
    place: Place = wired(PLACE)
    is_lost: bool = wired(BOOLEAN)
    code: str = wired(text(32))
    reason: str = wired(text(500))


@dataclass(frozen=True, kw_only=True, slots=True)
class Collect:
    """Asked of the last host of a chain by its owner: what comes out of `place` for one item of work, when it does."""

    kind: ClassVar[str] = "collect"
    place: str = wired(NAME)
    item: str = wired(NAME)


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenLane:
    """A way for a trainer's microbatches through this host: from whom they come (None: the trainer), where they go on
    (None: they are collected here). Gradients take it backwards. A lane lives as long as the stream that opened it.
    """

    kind: ClassVar[str] = "lane"
    lane: str = wired(NAME)
    span: Span = wired(SPAN)
    previous: Place | None = wired(optional(PLACE), default=None)
    onward: Place | None = wired(optional(PLACE), default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Forward:
    """Compute the lane's span and keep what its backward needs. Tensors: hidden [B, T, D], then mask [B, T] or none."""

    kind: ClassVar[str] = "forward"
    lane: str = wired(NAME)
    microbatch: MicrobatchId = wired(MICROBATCH)
    samples: int = wired(integer(1, MAX_BATCH))


@dataclass(frozen=True, kw_only=True, slots=True)
class Backward:
    """Gradient of the summed token loss with respect to the span's output [B, T, D]; `tokens` had a label."""

    kind: ClassVar[str] = "backward"
    lane: str = wired(NAME)
    microbatch: MicrobatchId = wired(MICROBATCH)
    tokens: int = wired(integer(1, 1 << 31))


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """The whole chain has answered: count this microbatch for these blocks, once."""

    kind: ClassVar[str] = "commit"
    microbatch: MicrobatchId = wired(MICROBATCH)
    span: Span = wired(SPAN)


@dataclass(frozen=True, kw_only=True, slots=True)
class Drop:
    """The trainer gives this microbatch up, on all blocks."""

    kind: ClassVar[str] = "drop"
    microbatch: MicrobatchId = wired(MICROBATCH)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluate:
    """A forward pass with the snapshot of `round`, or the newest where it is not there or none is named; `item` names
    the pass for the one who collects. Tensors as for Forward.
    """

    kind: ClassVar[str] = "evaluate"
    lane: str = wired(NAME)
    item: str = wired(NAME)
    round: int | None = wired(optional(COUNT), default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenSession:
    """Reserve cache for a text. `digests` by block ask for the bits of one snapshot, `round` for the snapshot of a
    round, neither for the newest, `plain` for the base model alone, `adapter` for the published adapter of that
    content. Steps come from `previous` (None: from the owner),
    and what comes out goes on to `onward` (None: the owner collects it). Cache is reserved for `expected_length`
    positions, or for `max_length`; `wait_seconds` is how long to wait where there is none, as far as the host allows.
    """

    kind: ClassVar[str] = "open"
    session: str = wired(NAME)
    span: Span = wired(SPAN)
    batch: int = wired(integer(1, MAX_BATCH))
    max_length: int = wired(integer(1, MAX_POSITIONS))
    digests: Mapping[int, bytes] | None = wired(optional(DIGESTS), default=None)
    round: int | None = wired(optional(COUNT), default=None)
    plain: bool = wired(BOOLEAN, default=False)
    adapter: bytes | None = wired(optional(_CONTENT), default=None)
    previous: Place | None = wired(optional(PLACE), default=None)
    onward: Place | None = wired(optional(PLACE), default=None)
    expected_length: int | None = wired(optional(integer(1, MAX_POSITIONS)), default=None)
    wait_seconds: float = wired(NUMBER, default=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """A neighbour of a session was replaced: from now on these are its neighbours."""

    kind: ClassVar[str] = "link"
    session: str = wired(NAME)
    previous: Place | None = wired(optional(PLACE), default=None)
    onward: Place | None = wired(optional(PLACE), default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """The session stands; these bits serve it until it ends. `adapter` repeats what was asked for: an older peer, which
    does not know of published adapters, would serve the run's own instead.
    """

    kind: ClassVar[str] = "opened"
    round: int = wired(COUNT)
    digests: Mapping[int, bytes] = wired(DIGESTS)
    adapter: bytes | None = wired(optional(_CONTENT), default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Go on at `position`; a smaller one rolls back. `rows` picks and reorders the batch first, as beam search does.

    A repeated `number` is not computed again, only passed on. The first `replay` tokens rebuild the caches of the next
    `depth` hosts, this one included, and go no further; `rows` are in their order already for those.
    Tensors: hidden [B, T, D], then mask [B, S] over all positions and positions [B, T] where the flags say so.
    """

    kind: ClassVar[str] = "step"
    session: str = wired(NAME)
    number: int = wired(COUNT)
    position: int = wired(integer(0, MAX_POSITIONS))
    has_mask: bool = wired(BOOLEAN, default=False)
    has_positions: bool = wired(BOOLEAN, default=False)
    rows: tuple[int, ...] | None = wired(optional(several(integer(0, MAX_BATCH), MAX_BATCH)), default=None)
    replay: int = wired(integer(0, MAX_POSITIONS), default=0)
    depth: int = wired(integer(0, MAX_BLOCKS), default=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Resume:
    """Pass step `number` on again, with all that was put out before it: the next `depth` hosts are new."""

    kind: ClassVar[str] = "resume"
    session: str = wired(NAME)
    number: int = wired(COUNT)
    depth: int = wired(integer(1, MAX_BLOCKS))
    onward: Place = wired(PLACE)


@dataclass(frozen=True, kw_only=True, slots=True)
class CloseSession:
    """The text is done: free its cache."""

    kind: ClassVar[str] = "close"
    session: str = wired(NAME)


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchUnit:
    """Ask for a unit's state at its last completed round, with its optimizer's moments or without."""

    kind: ClassVar[str] = "fetch"
    unit: UnitId = wired(UNIT)
    moments: bool = wired(BOOLEAN, default=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitReply:
    """A unit's state: tensors in the order of `names`; `digest` is over the adapter's tensors alone."""

    kind: ClassVar[str] = "unit"
    unit: UnitId = wired(UNIT)
    round: int = wired(COUNT)
    weight: float = wired(NUMBER)
    total_samples: int = wired(integer(0, MAX_SAMPLES))
    digest: bytes = wired(raw(32))
    names: tuple[str, ...] = wired(several(text(256), 512))


@dataclass(frozen=True, kw_only=True, slots=True)
class AskContent:
    """Of which units does this published adapter consist?"""

    kind: ClassVar[str] = "askcontent"
    content: bytes = wired(_CONTENT)


@dataclass(frozen=True, kw_only=True, slots=True)
class ContentReply:
    """The digests of its units, 32 bytes each, in the order of blocks; their digest is what was asked for."""

    kind: ClassVar[str] = "content"
    digests: bytes = wired(raw(MAX_CONTENT_BYTES))


@dataclass(frozen=True, kw_only=True, slots=True)
class OfferUnits:
    """Asked of a keeper by a holder: which of these versions do you lack?"""

    kind: ClassVar[str] = "offer"
    offers: tuple[Offer, ...] = wired(several(OFFER, MAX_OFFERS))


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Of what was offered: these are lacking, send them; and for those there is no room. The others are here."""

    kind: ClassVar[str] = "wanted"
    units: tuple[UnitId, ...] = wired(several(UNIT, MAX_OFFERS), default=())
    no_room: tuple[UnitId, ...] = wired(several(UNIT, MAX_OFFERS), default=())


@dataclass(frozen=True, kw_only=True, slots=True)
class KeepUnit(UnitReply):
    """A holder hands a unit's state to a keeper; tensors and fields as in the answer to a FetchUnit."""

    kind: ClassVar[str] = "keep"


@dataclass(frozen=True, kw_only=True, slots=True)
class AskInfo:
    """What do you hold, and are you there? Also the probe for round-trip time; so counts come only where wanted."""

    kind: ClassVar[str] = "ask"
    traffic: bool = wired(BOOLEAN, default=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class InfoReply:
    """The peer's own signed record, as fresh as can be (empty from a peer that serves no blocks), and its traffic."""

    kind: ClassVar[str] = "info"
    record: bytes = wired(raw(4096))
    unix_seconds: float = wired(NUMBER)
    traffic: tuple[KindTraffic, ...] = wired(several(KIND_TRAFFIC, MAX_KINDS), default=())


@dataclass(frozen=True, kw_only=True, slots=True)
class AskDial:
    """Can you dial me? On `port` of the address that you see me at, something says `token` to whoever connects."""

    kind: ClassVar[str] = "dial"
    port: int = wired(integer(1, 65535))
    token: bytes = wired(TOKEN)


@dataclass(frozen=True, kw_only=True, slots=True)
class Dialled:
    """Whether the token was read, and the IP address that was dialled. Not why, so that nobody learns of ports."""

    kind: ClassVar[str] = "dialled"
    address: str = wired(IP)
    reached: bool = wired(BOOLEAN)


Message = (
    Hello | Refusal | Done | Broken | Collect | OpenLane | Forward | Backward | Commit | Drop | Evaluate
    | OpenSession | Opened | Link | Step | Resume | CloseSession | FetchUnit | UnitReply
    | AskContent | ContentReply | OfferUnits | Wanted | KeepUnit | AskInfo | InfoReply | AskDial | Dialled
)  # fmt: skip
_TYPES: Mapping[str, type[Message]] = {
    message_type.kind: message_type
    for message_type in (
        Hello, Refusal, Done, Broken, Collect, OpenLane, Forward, Backward, Commit, Drop, Evaluate,
        OpenSession, Opened, Link, Step, Resume, CloseSession, FetchUnit, UnitReply,
        AskContent, ContentReply, OfferUnits, Wanted, KeepUnit, AskInfo, InfoReply, AskDial, Dialled,
    )
}  # fmt: skip


def is_kind(kind: str) -> bool:
    """Whether messages of this kind exist."""
    return kind in _TYPES


def parse_message(kind: str, body: Mapping[str, object]) -> Message:
    """A frame's body as a message.

    Raises:
        BadMessage: an unknown kind, or a field is missing, of the wrong type or out of bounds.
    """
    message_type = _TYPES.get(kind)
    if message_type is None:
        raise BadMessage(f"unknown message kind {kind!r}; the other peer may be newer, update this one")
    return from_body(message_type, kind, body)
