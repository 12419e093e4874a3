"""Where remote calls find what a round has opened here, also when they come a moment too early. No network."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import Generic, TypeVar

from averaging.errors import RoundFailed
from peers.network import PeerId

T = TypeVar("T")


class Registry(Generic[T]):
    """Values by key, for which callers wait a bounded time.

    Peers do not start a phase at the same moment: a faster one calls before the slower has registered, and must wait
    instead of being sent away. Each caller may wait for `max_waiting` keys at once and `seconds` each.
    """

    def __init__(self, *, seconds: float, max_waiting: int = 64) -> None:
        self._seconds = seconds
        self._max_waiting = max_waiting
        self._futures: dict[bytes, asyncio.Future[T]] = {}
        self._waiting: Counter[PeerId] = Counter()
        self._waiters: Counter[bytes] = Counter()

    def put(self, key: bytes, value: T) -> None:
        """Give `value` to all who ask for `key`, now and later."""
        self._fresh(key).set_result(value)

    def refuse(self, key: bytes, reason: str) -> None:
        """Send away all who ask for `key`, now and later: what it names cannot be built here."""
        future = self._fresh(key)
        future.set_exception(RoundFailed(reason))
        future.exception()  # retrieved: nobody may ever ask, and that is no error

    def drop(self, key: bytes) -> None:
        """Forget `key`; who asks from now on waits in vain until its time is up."""
        future = self._futures.pop(key, None)
        if future is not None:
            future.cancel()

    async def get(self, key: bytes, caller: PeerId) -> T:
        """The value of `key`, waiting until it is there.

        Raises:
            RoundFailed: refused, not registered in time, or the caller waits for too many keys already.
        """
        if self._waiting[caller] >= self._max_waiting:
            raise RoundFailed(f"{caller} waits for more than {self._max_waiting} classes at once")
        future = self._futures.get(key)
        if future is None:
            future = self._futures[key] = asyncio.get_running_loop().create_future()
        self._waiting[caller] += 1
        self._waiters[key] += 1
        try:
            done, _ = await asyncio.wait({future}, timeout=self._seconds)
        finally:
            self._leave(key, caller)
        if not done or future.cancelled():
            raise RoundFailed(f"{key.hex()[:12]} was not opened here within {self._seconds:g} s")
        return future.result()

    def _fresh(self, key: bytes) -> asyncio.Future[T]:
        future = self._futures.get(key)
        if future is None or future.done():
            future = self._futures[key] = asyncio.get_running_loop().create_future()
        return future

    def _leave(self, key: bytes, caller: PeerId) -> None:
        self._waiting[caller] -= 1
        self._waiters[key] -= 1
        self._waiting += Counter()  # drops the zeros
        self._waiters += Counter()
        future = self._futures.get(key)
        if future is not None and not future.done() and key not in self._waiters:
            with contextlib.suppress(KeyError):
                del self._futures[key]
