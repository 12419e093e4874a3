"""Serves the state of units to newcomers, to holders that missed a round, and to whoever exports the adapter."""

from __future__ import annotations

from typing import Protocol

from blocks.spans import UnitId
from blocks.unit_state import UnitState, joined
from peers.answering import Handler
from peers.calls import Answer, Question
from peers.errors import BadMessage, Refused
from peers.messages import FetchUnit, RefusalCode, UnitReply
from peers.network import PeerId


class UnitSource(Protocol):
    """Whoever holds units."""

    async def read_unit(self, unit: UnitId, *, moments: bool) -> UnitState | None:
        """The unit at its last completed round, or None where it is not held."""


class UnitsService(Handler):
    """One host's `units` streams."""

    def __init__(self, source: UnitSource) -> None:
        self._source = source

    async def answer(self, question: Question) -> Answer:
        """Answer one FetchUnit."""
        message = question.message
        if not isinstance(message, FetchUnit):
            raise BadMessage(f"a '{message.kind}' message does not belong on a units stream")
        state = await self._source.read_unit(message.unit, moments=message.moments)
        if state is None:
            raise Refused(f"unit {message.unit} is not held here", RefusalCode.SPAN)
        named = joined(state)
        reply = UnitReply(
            unit=state.unit,
            round=state.round,
            weight=state.weight,
            total_samples=state.total_samples,
            digest=state.digest,
            names=tuple(named),
        )
        return Answer(message=reply, tensors=tuple(named.values()))

    async def stream_closed(self, peer: PeerId, stream: int) -> None:
        """Nothing is kept between questions."""
