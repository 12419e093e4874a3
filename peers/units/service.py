"""Serves the state of units to newcomers, to holders that missed a round and to exports; takes some to keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from blocks.spans import UnitId
from blocks.unit_state import UnitState
from peers.errors import BadMessage, Refused
from peers.network import PeerId
from peers.published.service import SharedSource, content_answer
from peers.streams.answering import Handler
from peers.streams.calls import Answer, Question
from peers.streams.messages import AskContent, FetchUnit, KeepUnit, OfferUnits, RefusalCode, Wanted
from peers.streams.values import Offer
from peers.units.transfer import Digest, as_answer, unpacked


class UnitSource(Protocol):
    """Whoever has units."""

    async def read_unit(self, unit: UnitId, *, moments: bool) -> UnitState | None:
        """The unit at its last completed round, or None where it is not here."""


class UnitKeeper(UnitSource, Protocol):
    """Whoever stores units for their holders. `peer` is the one who asks, by transport identity."""

    def look_at(self, peer: PeerId, offers: Sequence[Offer]) -> Wanted:
        """Which of these versions are lacking.

        Raises:
            Refused: the peer is not known to hold them, or they cannot be.
        """

    async def keep(self, peer: PeerId, state: UnitState) -> None:
        """Store a version that is newer than what is here; the newest is left when this returns.

        Raises:
            Refused: as for `look_at`; or the state does not fit the unit, or there is no room.
        """


class UnitsService(Handler):
    """One host's `units` streams. `shared` are the published adapters that it has, if it serves any."""

    def __init__(
        self, source: UnitSource, keeper: UnitKeeper, digest: Digest, shared: SharedSource | None = None
    ) -> None:
        self._source, self._keeper, self._digest, self._shared = source, keeper, digest, shared

    async def answer(self, question: Question) -> Answer:
        """Answer one FetchUnit, AskContent, OfferUnits or KeepUnit."""
        match question.message:
            case FetchUnit(unit=unit, moments=moments):
                return await self._fetched(unit, moments)
            case AskContent(content=content) if self._shared is not None:
                return content_answer(self._shared, content)
            case OfferUnits(offers=offers):
                return Answer(message=self._keeper.look_at(question.peer, offers))
            case KeepUnit(unit=unit) as message:
                state = await unpacked(message, question.tensors, unit, digest=self._digest)
                await self._keeper.keep(question.peer, state)
                return Answer()
        raise BadMessage(f"a '{question.message.kind}' message does not belong on a units stream")

    async def stream_closed(self, peer: PeerId, stream: int) -> None:
        """Nothing is remembered between questions."""

    async def _fetched(self, unit: UnitId, moments: bool) -> Answer:
        shared = () if self._shared is None else (self._shared,)
        for source in (self._source, self._keeper, *shared):
            state = await source.read_unit(unit, moments=moments)
            if state is not None:
                return as_answer(state)
        raise Refused(f"unit {unit} is not held here", RefusalCode.SPAN)
