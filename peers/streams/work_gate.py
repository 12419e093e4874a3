"""The gate before a service: refuses new work while this peer serves nobody, and knows what is still under way.

What was begun goes on through a closed gate: gradients, commits, steps of open sessions. So does this peer's own work.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from peers.errors import Refused
from peers.network import PeerId
from peers.streams.answering import Handler
from peers.streams.calls import Answer, Question
from peers.streams.messages import Evaluate, Forward, OpenLane, OpenSession, RefusalCode
from peers.streams.send_limit import SendLimit

MOST_SECONDS_BEHIND = 20.0  # of a send limit; with more work, answers would come too late for those who wait

_NEW = (OpenLane, Forward, Evaluate, OpenSession)


class WorkGate(Handler):
    """Stands for `handler` towards the others. `why` is why it is closed, in words for them; empty while it is open."""

    def __init__(
        self, handler: Handler, me: PeerId, limit: SendLimit, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.why = ""
        self.answering = 0
        """Questions of others that are being answered now."""
        self._handler, self._me, self._limit, self._clock = handler, me, limit, clock
        self._lanes: set[int] = set()
        self._asked_at = float("-inf")

    @property
    def has_trainers(self) -> bool:
        """Whether a trainer is connected, with work under way or not."""
        return bool(self._lanes)

    def is_quiet(self, seconds: float) -> bool:
        """Whether no trainer is connected, or nobody has asked anything for so long."""
        return not self._lanes or self._clock() - self._asked_at >= seconds

    async def answer(self, question: Question) -> Answer:
        """What the handler answers.

        Raises:
            Refused: it would be new work, and the gate is closed or the send limit too far behind.
        """
        if question.peer == self._me:
            return await self._handler.answer(question)
        if isinstance(question.message, _NEW):
            self._check()
        self._asked_at = self._clock()
        if isinstance(question.message, OpenLane):
            self._lanes.add(question.stream)
        self.answering += 1
        try:
            return await self._handler.answer(question)
        finally:
            self.answering -= 1

    async def stream_closed(self, peer: PeerId, stream: int) -> None:
        """The asker is gone."""
        self._lanes.discard(stream)
        await self._handler.stream_closed(peer, stream)

    def _check(self) -> None:
        if self.why:
            raise Refused(self.why, RefusalCode.BUSY)
        behind = self._limit.seconds_behind()
        if behind > MOST_SECONDS_BEHIND:
            raise Refused(f"this host's bandwidth limit is {behind:.0f} s behind; try another host", RefusalCode.BUSY)
