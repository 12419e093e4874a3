"""Opens, links and closes the sessions of one text at the hosts of a chain, so that each knows its neighbours."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from blocks.spans import Span
from peers.errors import NoRoute, PeerLost, Refused
from peers.network import PeerId
from peers.routes.router import Router
from peers.routes.routing import Hop
from peers.streams.messages import CloseSession, Link, Opened, OpenSession, RefusalCode, StreamKind
from peers.streams.pool import Pool
from peers.streams.values import Place
from peers.streams.wire_format import WireFormat

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 2.0
FULL_SECONDS = 0.5  # for a chain without the hosts that are full, before one waits at their doors
GROWTH = 64  # positions that a session which is moved has room for at least


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionConfig:
    """One text: rows, longest length, whether an adapter is used (`adapter`: a published one, by its content; else the
    run's), and in which form activations travel.

    Hosts reserve cache for `expected_length` positions (None: for all); a text that goes on where there is no more is
    moved to another host. `wait_seconds` is how long to wait at a host's full cache if no other host has room.
    """

    batch: int
    max_length: int
    plain: bool = False
    adapter: bytes | None = None
    wire: WireFormat = WireFormat.BF16
    call_seconds: float = 120.0
    max_tries: int = 12
    expected_length: int | None = None
    wait_seconds: float = 5.0


@dataclass(slots=True, eq=False)
class Leg:
    """The session at one host of the chain. A new one has nothing of the text yet."""

    hop: Hop
    session: str
    opened: Opened
    is_new: bool = True

    @property
    def place(self) -> Place:
        """How its neighbours name it."""
        return Place(self.hop.peer, self.session)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Wanted:
    """What is asked of every host that is opened: bits of the adapter by block, or a round, or neither."""

    digests: Mapping[int, bytes] | None = None
    round: int | None = None
    at_least: int = 0
    wait_seconds: float = 0.0


class Legs:
    """The sessions of one text. The chain of them is the caller's; this opens and closes parts of it."""

    def __init__(self, pool: Pool, router: Router, config: SessionConfig) -> None:
        self._pool, self._router, self._config = pool, router, config

    async def open(
        self,
        span: Span,
        digests: Mapping[int, bytes] | None = None,
        *,
        previous: Place | None = None,
        onward: Place | None = None,
        avoid: frozenset[PeerId] = frozenset(),
        at_least: int = 0,
    ) -> list[Leg]:
        """Sessions over `span` between two neighbours: with the wanted bits, or else all at one common round.

        Hosts whose cache is full, those to `avoid` among them, are waited for only if there is no other. There is room
        for `at_least` so many positions from the beginning.

        Raises:
            NoRoute: some blocks have no live holder.
            Refused: all hosts of some blocks refuse; this is the last one's reason.
        """
        last: Refused | None = None
        is_full, wanted = bool(avoid), _Wanted(digests=digests, at_least=at_least)
        for _ in range(self._config.max_tries):
            try:
                async with asyncio.timeout(FULL_SECONDS if is_full else None):
                    hops = await self._router.fast(span, avoid)
            except (NoRoute, TimeoutError):
                if is_full:
                    is_full, avoid = False, frozenset()
                    wanted = replace(wanted, wait_seconds=self._config.wait_seconds)
                    continue
                if last is not None:
                    raise last from None
                raise
            places = [previous, *(Place(hop.peer, uuid.uuid4().hex) for hop in hops), onward]
            failures: dict[PeerId, PeerLost | Refused] = {}
            found = await self._open_all(hops, places, wanted)
            legs: list[Leg] = []
            for hop, result in zip(hops, found, strict=True):
                if isinstance(result, Leg):
                    legs.append(result)
                elif isinstance(result, (PeerLost, Refused)):
                    failures[hop.peer] = result
                else:
                    await self.close(legs)
                    raise result
            if not failures and digests is None and len({leg.opened.round for leg in legs}) > 1:
                failures = await self._at_one_round(legs, places, wanted)
            if not failures:
                return legs
            await self.close([leg for leg in legs if leg.hop.peer not in failures])
            for peer, error in failures.items():
                last, avoid = self._note(peer, error, last, avoid)
                is_full = is_full or (isinstance(error, Refused) and error.code == RefusalCode.FULL)
        raise last or NoRoute(f"no chain over blocks {span} could be opened; see the log for each reason")

    async def link(self, leg: Leg, previous: Place | None, onward: Place | None) -> None:
        """Tell a host of its new neighbours. One that cannot be told will refuse their steps, and be replaced."""
        message = Link(session=leg.session, previous=previous, onward=onward)
        try:
            await self._pool.call(leg.hop.peer, StreamKind.DECODE, message, seconds=self._config.call_seconds)
        except (PeerLost, Refused) as error:
            logger.warning("link not delivered peer=%s reason=%s", leg.hop.peer, error)

    async def close(self, legs: Sequence[Leg]) -> None:
        """Free the caches; a host that cannot be told frees its own by deadline."""
        await asyncio.gather(*(self._close_one(leg.place) for leg in legs))

    def _note(
        self, peer: PeerId, error: PeerLost | Refused, last: Refused | None, avoid: frozenset[PeerId]
    ) -> tuple[Refused | None, frozenset[PeerId]]:
        """What a failed opening means for the next try."""
        logger.warning("no session peer=%s reason=%s", peer, error)
        if isinstance(error, PeerLost):
            self._router.failed(peer, str(error))
            return last, avoid
        if error.code == RefusalCode.MALFORMED:
            raise error
        return error, avoid | {peer}

    async def _at_one_round(
        self, legs: list[Leg], places: Sequence[Place | None], wanted: _Wanted
    ) -> dict[PeerId, PeerLost | Refused]:
        """Reopen the legs that are ahead at the oldest round among them; keep a mixture where that is gone."""
        number = min(leg.opened.round for leg in legs)
        failures: dict[PeerId, PeerLost | Refused] = {}
        for i, leg in enumerate(legs):
            if leg.opened.round == number:
                continue
            try:
                await self._close_one(leg.place)
                try:
                    legs[i] = await self._open_one(leg.hop, places, i + 1, replace(wanted, round=number))
                except Refused as error:
                    if error.code != RefusalCode.SNAPSHOT:
                        raise
                    logger.warning("blocks %s stay at round %d: %s", leg.hop.span, leg.opened.round, error)
                    legs[i] = await self._open_one(leg.hop, places, i + 1, wanted)
            except (PeerLost, Refused) as error:
                failures[leg.hop.peer] = error
        return failures

    async def _open_all(
        self, hops: Sequence[Hop], places: Sequence[Place | None], wanted: _Wanted
    ) -> list[Leg | BaseException]:
        """A session at each of `places` but the first and the last, or what went wrong there."""
        opening = (self._open_one(hop, places, i, wanted) for i, hop in enumerate(hops, start=1))
        try:
            return await asyncio.gather(*opening, return_exceptions=True)
        except asyncio.CancelledError:  # some may be open, and nobody else knows their names
            await asyncio.gather(*(self._close_one(place) for place in places[1:-1] if place is not None))
            raise

    async def _open_one(self, hop: Hop, places: Sequence[Place | None], i: int, wanted: _Wanted) -> Leg:
        """Open the session at `places[i]`, whose neighbours stand beside it."""
        place, digests = places[i], wanted.digests
        assert place is not None
        message = OpenSession(
            session=place.name,
            span=hop.span,
            batch=self._config.batch,
            max_length=self._config.max_length,
            digests=None if digests is None else {block: digests[block] for block in hop.span.blocks()},
            round=wanted.round,
            plain=self._config.plain,
            adapter=self._config.adapter,
            previous=places[i - 1],
            onward=places[i + 1],
            expected_length=self._expected(wanted.at_least),
            wait_seconds=wanted.wait_seconds,
        )
        seconds = self._config.call_seconds
        answer = await self._pool.call(hop.peer, StreamKind.DECODE, message, seconds=seconds)
        if not isinstance(answer.message, Opened):
            raise PeerLost(f"peer {hop.peer} answered an open with '{answer.message.kind}'")
        if answer.message.adapter != self._config.adapter:
            await self._close_one(place)
            raise Refused(f"peer {hop.peer} serves its own adapter instead of the one asked for", RefusalCode.ADAPTER)
        return Leg(hop=hop, session=place.name, opened=answer.message)

    def _expected(self, at_least: int) -> int | None:
        """What a host is to reserve from the beginning; a text that outgrows it may have to move."""
        expected = self._config.expected_length
        if expected is None:
            return None
        return min(self._config.max_length, max(expected, at_least + GROWTH if at_least else 0))

    async def _close_one(self, place: Place) -> None:
        try:
            message = CloseSession(session=place.name)
            await self._pool.call(place.peer, StreamKind.DECODE, message, seconds=CLOSE_SECONDS)
        except (PeerLost, Refused) as error:
            logger.debug("close not delivered peer=%s reason=%s", place.peer, error)
