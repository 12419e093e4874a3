"""Serves the units of published adapters, and the lists of their digests, to whoever asks."""

from __future__ import annotations

from typing import Protocol

from blocks.spans import UnitId
from blocks.unit_state import UnitState
from peers.errors import BadMessage, Refused
from peers.network import PeerId
from peers.streams.answering import Handler
from peers.streams.calls import Answer, Question
from peers.streams.messages import AskContent, ContentReply, FetchUnit, RefusalCode
from peers.units.transfer import as_answer


class SharedSource(Protocol):
    """Whoever has published adapters."""

    def content(self, content: bytes) -> bytes | None:
        """The list of an adapter's digests (see content.py), or None where it is not here."""

    async def read_unit(self, unit: UnitId, *, moments: bool) -> UnitState | None:
        """See peers.units.service.UnitSource; moments there are none."""


class SharedUnits(Handler):
    """The `units` streams of a peer that publishes; a host's `UnitsService` has the same beside its own units."""

    def __init__(self, source: SharedSource) -> None:
        self._source = source

    async def answer(self, question: Question) -> Answer:
        """Answer one AskContent or FetchUnit."""
        match question.message:
            case AskContent(content=content):
                return content_answer(self._source, content)
            case FetchUnit(unit=unit, moments=moments):
                state = await self._source.read_unit(unit, moments=moments)
                if state is None:
                    raise Refused(f"unit {unit} is not held here", RefusalCode.SPAN)
                return as_answer(state)
        raise BadMessage(f"a '{question.message.kind}' message does not belong on a units stream of who only publishes")

    async def stream_closed(self, peer: PeerId, stream: int) -> None:
        """Nothing is remembered between questions."""


def content_answer(source: SharedSource, content: bytes) -> Answer:
    """The answer to an AskContent.

    Raises:
        Refused: the adapter is not here.
    """
    listed = source.content(content)
    if listed is None:
        raise Refused(f"adapter {content.hex()[:16]} is not served here", RefusalCode.ADAPTER)
    return Answer(message=ContentReply(digests=listed))
