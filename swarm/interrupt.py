"""Ends work from another thread: whoever waits for the network in it stops waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from typing import TypeVar

from swarm.errors import SwarmError

T = TypeVar("T")


class Interrupted(SwarmError):
    """The work was ended before it was done, as somebody asked."""


class Interrupt:
    """One piece of work that may be ended. It is done in one thread; `set` is called from any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: Future[object] | None = None
        self._is_set = False

    @property
    def is_set(self) -> bool:
        """Whether the work is to end."""
        return self._is_set

    def set(self) -> None:
        """End the work: what it waits for is cancelled, and it waits for nothing more."""
        with self._lock:
            self._is_set = True
            waiting = self._waiting
        if waiting is not None:
            waiting.cancel()

    def wait(self, work: Coroutine[object, object, T], loop: asyncio.AbstractEventLoop) -> T:
        """The result of `work` on another thread's loop.

        Raises:
            Interrupted: `set` was called, before or meanwhile.
        """
        with self._lock:
            if self._is_set:
                work.close()
                raise Interrupted("the text was ended before it was complete")
            future = asyncio.run_coroutine_threadsafe(work, loop)
            self._waiting = future  # type: ignore[assignment]
        try:
            return future.result()
        except CancelledError as error:
            raise Interrupted("the text was ended before it was complete") from error
        finally:
            with self._lock:
                self._waiting = None
