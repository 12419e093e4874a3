"""Bytes on streams, headers included, by peer and kind of question: what `swarm status` shows of a peer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from peers.network import PeerId
from peers.streams.fields import Codec, integer, text
from peers.streams.send_limit import SendLimit

MAX_PEERS = 256  # ids cost nothing: of more peers, only the sums are kept
MAX_KINDS = 64  # that a peer may tell of
_KIND, _COUNT = text(32), integer(0, (1 << 63) - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bytes:
    """What went out and what came in."""

    sent: int = 0
    received: int = 0

    def plus(self, other: Bytes) -> Bytes:
        """The sum of both."""
        return replace(self, sent=self.sent + other.sent, received=self.received + other.received)


@dataclass(frozen=True, slots=True)
class KindTraffic:
    """Bytes of one kind of question over all peers, as a peer tells it to another."""

    kind: str
    sent: int
    received: int


def _read(value: object) -> KindTraffic:
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError
    kind = _KIND.read(value[0])
    if not kind.isidentifier():  # it goes to a terminal
        raise ValueError
    return KindTraffic(kind, _COUNT.read(value[1]), _COUNT.read(value[2]))


KIND_TRAFFIC: Codec[KindTraffic] = Codec(
    "traffic [kind, sent, received]", _read, lambda one: [_KIND.write(one.kind), one.sent, one.received]
)


class Traffic:
    """Counts every frame of this peer's streams, all of which go out under one `limit`. An answer counts under the kind
    of its question.

    Kinds must be of known messages (`hello`, `step`, ...) or fixed words, else whoever sends could make them grow.
    """

    def __init__(self, max_peers: int = MAX_PEERS, limit: SendLimit | None = None) -> None:
        self.limit = limit or SendLimit()
        self._max_peers = max_peers
        self._by_kind: dict[str, Bytes] = {}
        self._by_peer: dict[PeerId, dict[str, Bytes]] = {}

    def add(self, peer: PeerId, kind: str, *, sent: int = 0, received: int = 0) -> None:
        """Count bytes of one frame; where peers are too many, the one that was quiet for longest is forgotten."""
        more = Bytes(sent=sent, received=received)
        kinds = self._by_peer.pop(peer, {})
        self._by_peer[peer] = kinds  # the newest is last
        if len(self._by_peer) > self._max_peers:
            del self._by_peer[next(iter(self._by_peer))]
        for counts in (kinds, self._by_kind):
            counts[kind] = counts.get(kind, Bytes()).plus(more)

    @property
    def by_kind(self) -> Mapping[str, Bytes]:
        """Over all peers, those forgotten too."""
        return dict(self._by_kind)

    @property
    def by_peer(self) -> Mapping[PeerId, Mapping[str, Bytes]]:
        """Of the peers heard from or written to most lately, by kind."""
        return {peer: dict(kinds) for peer, kinds in self._by_peer.items()}

    @property
    def total(self) -> Bytes:
        """Over all peers and kinds."""
        return total(self._by_kind.values())


def total(counts: Iterable[Bytes]) -> Bytes:
    """The sum of some counts."""
    found = Bytes()
    for each in counts:
        found = found.plus(each)
    return found
