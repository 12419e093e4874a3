"""Refuses single questions of a private run's members whose role does not allow them, on streams that others may use.

Everybody may fetch units; only hosts may hand units to others to keep.
"""

from __future__ import annotations

from peers.errors import Refused
from peers.network import PeerId
from peers.private.gate import Gate
from peers.private.membership import Role
from peers.streams.answering import Handler
from peers.streams.calls import Answer, Question
from peers.streams.messages import KeepUnit, OfferUnits, RefusalCode

_FOR_HOSTS = (OfferUnits, KeepUnit)


class RoleGuard(Handler):
    """One service behind a gate."""

    def __init__(self, handler: Handler, gate: Gate) -> None:
        self._handler, self._gate = handler, gate

    async def answer(self, question: Question) -> Answer:
        """As the service does.

        Raises:
            Refused: the question is for hosts, and the asker is none.
        """
        if isinstance(question.message, _FOR_HOSTS) and self._gate.role(question.peer) is not Role.HOST:
            raise Refused(f"only hosts may send '{question.message.kind}' in this private run", RefusalCode.MEMBER)
        return await self._handler.answer(question)

    async def stream_closed(self, peer: PeerId, stream: int) -> None:
        """As the service does."""
        await self._handler.stream_closed(peer, stream)
