"""An event loop in a thread of its own, so that the library works in scripts and inside notebooks alike."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import TypeVar

import uvloop

T = TypeVar("T")


class LoopThread:
    """Runs coroutines for callers in other threads. `close` ends the loop; what still runs is cancelled."""

    def __init__(self, name: str = "network") -> None:
        self.loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[object, object, T]) -> T:
        """Wait for `work` in the calling thread; on Ctrl-C it is cancelled before the interrupt goes on.

        Raises:
            RuntimeError: the loop was closed.
        """
        if self.loop.is_closed():
            work.close()
            raise RuntimeError("the loop is closed; start a new node")
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel what runs and end the thread."""
        if self._thread.is_alive():
            with suppress(TimeoutError):  # what does not end when cancelled must not keep the process
                asyncio.run_coroutine_threadsafe(self._cancel_all(), self.loop).result(timeout=30)
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(timeout=30)
            self.loop.close()

    def _work(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    async def _cancel_all(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
