"""How a handler of hivemind's streams ends without losing what it said last.

p2pd resets a stream that is closed here first: what was sent just before, and lies unread at the other side, is lost
then, and the other side sees a stream that ends without a word. So the side that asked is to close it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

T = TypeVar("T")


class KeptStream(Generic[T]):
    """A handler's requests, which can still be read after a reader of them was cancelled."""

    def __init__(self, stream: AsyncIterator[T]) -> None:
        self._stream = stream
        self._pending: asyncio.Task[T] | None = None

    def __aiter__(self) -> KeptStream[T]:
        return self

    async def __anext__(self) -> T:
        if self._pending is None:
            self._pending = asyncio.ensure_future(self._next())
            self._pending.add_done_callback(lambda read: read.cancelled() or read.exception())  # seen, if nobody asks
        item = await asyncio.shield(self._pending)  # shielded: a cancelled generator would be over
        self._pending = None  # not when it raised: the end stays the end
        return item

    async def drain(self, seconds: float) -> None:
        """Read on and throw away until the other side closes the stream, or the time is up.

        hivemind ends a handler by cancelling it once the stream is closed; an end-of-stream message comes before that.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                async for _ in self:
                    pass
                await asyncio.Event().wait()

    async def aclose(self) -> None:
        """Let go of a read that is under way."""
        if self._pending is not None:
            self._pending.cancel()

    async def _next(self) -> T:
        return await anext(self._stream)
