"""Serves what this peer says of itself, which is also the probe for round trips, and whether it can dial the asker."""

from __future__ import annotations

import time
from collections.abc import Callable

from peers.dialling_back import DialBack
from peers.errors import BadMessage
from peers.network import PeerId
from peers.streams.answering import Handler
from peers.streams.calls import Answer, Question
from peers.streams.messages import AskDial, AskInfo, InfoReply
from peers.streams.traffic import KindTraffic, Traffic


class InfoService(Handler):
    """One peer's `info` streams; `record` gives its sealed record, or nothing if it serves no blocks. Without
    `dial_back` it dials nobody who asks for it.
    """

    def __init__(
        self,
        record: Callable[[], bytes],
        traffic: Traffic,
        clock: Callable[[], float] = time.time,
        dial_back: DialBack | None = None,
    ) -> None:
        self._record, self._traffic, self._clock, self._dial_back = record, traffic, clock, dial_back

    async def answer(self, question: Question) -> Answer:
        """Answer one AskInfo, or AskDial."""
        if isinstance(question.message, AskDial) and self._dial_back is not None:
            return Answer(message=await self._dial_back.answer(question.peer, question.message))
        if not isinstance(question.message, AskInfo):
            raise BadMessage(f"a '{question.message.kind}' message does not belong on an info stream")
        counts = self._traffic.by_kind if question.message.traffic else {}
        traffic = tuple(KindTraffic(kind, counts[kind].sent, counts[kind].received) for kind in sorted(counts))
        return Answer(message=InfoReply(record=self._record(), unix_seconds=self._clock(), traffic=traffic))

    async def stream_closed(self, peer: PeerId, stream: int) -> None:
        """Nothing is kept between questions."""
