"""A peer's record as a host: what it holds or is going to hold, and how fast it is; repeated before it expires."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blocks.spans import Span
from peers.records import MAX_ADDRESSES, PeerRecord, seal_record
from peers.streams.messages import PROTOCOL_MAX, PROTOCOL_MIN
from swarm.hosts.contributions import Contributions, Given

if TYPE_CHECKING:
    from swarm.hosts.host import Host
    from swarm.node import Node

RECORD_LIFE_SECONDS = 60.0
_GIVEN_SECONDS = 10  # between two words of what this peer has given, while that grows


@dataclass(kw_only=True, slots=True)
class Place:
    """Where a host stands among the others; the rules of placement go by it (peers.placing.standing).

    `since` is the DHT time at which it took `span`, or promised `moves_to`; while it loads, that is the same.
    """

    span: Span
    capacity: int
    pinned: bool
    since: float
    moved: bool = False
    moves_to: Span | None = None


class Announcer:
    """Keeps this peer's record in the directory: at once on change, and before it expires."""

    def __init__(self, node: Node, place: Place, given: Contributions, *, nickname: str = "") -> None:
        self.place, self.given = place, given
        self.host: Host | None = None
        """What is held; None while it is being loaded."""
        self.sealed = b""
        self.adapters: Callable[[], tuple[bytes, ...]] = tuple
        """Marks of the published adapters that are served with what is held."""
        self.away = ""
        """Why this peer is no host now, one of peers.records.AWAY."""
        self._node, self._nickname = node, nickname
        self._stood = place.since, place.moved
        self._speeds = 0.0, 0.0  # through the span that is told; a host that moves is as fast as it was

    async def run(self) -> None:
        """Announce again until cancelled; the first time was before."""
        while True:
            said = self._round()
            for second in range(1, int(RECORD_LIFE_SECONDS / 2) + 1):
                await asyncio.sleep(1.0)
                if self._round() != said or (second >= _GIVEN_SECONDS and self.given.is_news):
                    break
            await self.announce()

    async def promise(self, span: Span | None) -> None:
        """Tell the others that this host is going to hold `span` instead; None: it stays.

        Raises:
            NetworkFailed: they cannot be told.
        """
        place = self.place
        if span is None:
            place.since, place.moved = self._stood
        else:
            self._stood = place.since, place.moved
            place.since, place.moved = self._node.network.dht_time(), True
        place.moves_to = span
        await self.announce()

    async def arrived(self, host: Host, served_tokens: Callable[[], int]) -> None:
        """The span is loaded and served: from here on others can use it. `served_tokens` is what it has served so far.

        Raises:
            NetworkFailed: they cannot be told.
        """
        place, self.host = self.place, host
        place.span, place.moves_to, place.since = host.span, None, self._node.network.dht_time()
        self._speeds = host.tokens_per_second, host.backward_tokens_per_second
        ledger = host.trainer.ledger
        self.given.begin(lambda: Given(served_tokens=served_tokens(), trained_tokens=ledger.trained_tokens))
        await self.announce()

    async def gone(self) -> None:
        """Nothing is held any more, until the next span arrives.

        Raises:
            NetworkFailed: the others cannot be told.
        """
        self.given.end()
        self.host, self.away, self.adapters = None, "", tuple
        await self.announce()

    async def announce(self) -> None:
        """Publish the record as of now.

        Raises:
            NetworkFailed: it cannot be done.
        """
        node, host, place = self._node, self.host, self.place
        given = await self.given.save()
        serving, behind_nat = host is not None and not self.away, node.config.network.client_mode
        record = PeerRecord(
            run=node.config.run,
            peer=node.network.peer_id,
            span=place.span,
            tokens_per_second=self._speeds[0],
            backward_tokens_per_second=self._speeds[1],
            queue_seconds=0.0 if host is None else _queue_seconds(host),
            round=self._round(),
            cache_free_bytes=0 if host is None else max(0, host.caches.free_bytes),
            addresses=(await node.network.addresses())[:MAX_ADDRESSES],
            protocol=(PROTOCOL_MIN, PROTOCOL_MAX),
            software=node.hello().software,
            dtype="none" if host is None else host.config.quantize or str(host.config.dtype).removeprefix("torch."),
            nickname=self._nickname,
            # The DHT keeps what expires last, so a goodbye is a newer record without the role, not a shorter one.
            roles=(("holder",) if behind_nat else ("host",)) if serving else (),
            away=self.away,
            capacity=place.capacity,
            pinned=place.pinned,
            since=place.since,
            moved=place.moved,
            # What only this peer can use is no promise to others.
            moves_to=None if behind_nat else place.moves_to or (place.span if host is None else None),
            served_tokens=given.served_tokens,
            trained_tokens=given.trained_tokens,
            adapters=self.adapters(),
            expires_at=node.network.dht_time() + RECORD_LIFE_SECONDS,
        )
        self.sealed = seal_record(node.network.identity, record)
        await node.directory.publish(record)

    def _round(self) -> int:
        return 0 if self.host is None else self.host.round


def _queue_seconds(host: Host) -> float:
    return min(600.0, host.thread.backlog() / max(host.tokens_per_second, 1e-3))
