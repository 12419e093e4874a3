"""Whose fault it is that a class fails: whoever broke it, not those who ended their streams because of it."""

from __future__ import annotations

import asyncio
import contextlib

from hivemind.averaging.partition import AllreduceException
from hivemind.p2p import PeerID

from averaging.hivemind_lost import LostPeer, StreamEnded
from averaging.hivemind_reducer import SumReducer
from averaging.hivemind_wire import Senders

TELL_SECONDS = 1.0  # to say who is to blame, once a class has failed


class Judge:
    """One class's, at one of its reducers."""

    def __init__(self, reducer: SumReducer, senders: Senders) -> None:
        self._reducer, self._senders = reducer, senders

    async def judge(self, peer: PeerID, error: Exception) -> LostPeer:
        """Who is to blame for `error` on the stream with `peer`: itself, unless its stream just ended.

        A peer says who broke the class before it ends its streams, so others are heard first.
        """
        if isinstance(error, LostPeer):
            return error
        if isinstance(error, StreamEnded) or not isinstance(error, AllreduceException):
            await wait_for(self._reducer.failed, TELL_SECONDS)
            if isinstance(self._reducer.failure, LostPeer):
                return self._reducer.failure
        return self.lose(peer, str(error) or type(error).__name__)

    def lose(self, peer: PeerID, reason: str) -> LostPeer:
        """A holder cannot finish: the class is over for all who still wait for a sum here."""
        failure = LostPeer(peer, reason)
        self._reducer.fail(failure)
        self._senders.serve(peer)
        return failure


async def wait_for(event: asyncio.Event, seconds: float) -> None:
    """Until the event, or no longer than `seconds`."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
