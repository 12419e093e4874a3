"""An event loop in a thread of its own, so that the library works in scripts and inside notebooks alike."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import uvloop

from swarm.errors import BadConfig

LEFT = "this peer has left its run; enter it again"
T = TypeVar("T")


class LoopThread:
    """Runs coroutines for callers in other threads. `close` ends the loop; what still runs is cancelled."""

    def __init__(self, name: str = "network") -> None:
        self.loop = uvloop.new_event_loop()
        self.loop.set_exception_handler(_tell)
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[object, object, T]) -> T:
        """Wait for `work` in the calling thread; on Ctrl-C it is cancelled before the interrupt goes on.

        Raises:
            BadConfig: the loop was closed.
        """
        if self.loop.is_closed():
            work.close()
            raise BadConfig(LEFT)
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


def _tell(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what a loop wants to say, except of the waiting tasks that each search of hivemind's DHT leaves behind: they
    wait for an event of their own, and are garbage with it.
    """
    task = context.get("task")
    waits = isinstance(task, asyncio.Task) and getattr(task.get_coro(), "__qualname__", "") == "Event.wait"
    if not (waits and context.get("message") == "Task was destroyed but it is pending!"):
        loop.default_exception_handler(context)
