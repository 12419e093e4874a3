"""The client's two questions about one piece of work: sent to the first host of a chain, collected at the last."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import TypeVar

logger = logging.getLogger(__name__)

S = TypeVar("S")
T = TypeVar("T")


class Collecting:
    """Asks both at once. The word that work is through comes after its result, and is not waited for."""

    def __init__(self, failure: type[Exception]) -> None:
        """`failure` is what both questions raise where a host of the chain failed."""
        self._failure = failure
        self._sending: set[asyncio.Task[object]] = set()

    async def result(self, send: Coroutine[object, object, S], collect: Coroutine[object, object, T]) -> T:
        """What `collect` gives. Where both fail, the sender's word counts: who passes work on knows where it ended.

        Raises:
            Exception: the failure of either.
        """
        sending: asyncio.Task[object] = asyncio.create_task(send)
        collecting = asyncio.create_task(collect)
        try:
            await asyncio.wait({sending, collecting}, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                await sending
            try:
                return await collecting
            except self._failure:
                await sending
                raise
        except BaseException:
            sending.cancel()
            raise
        finally:
            collecting.cancel()
            self._sending.add(sending)
            sending.add_done_callback(self._sent)

    def cancel(self) -> None:
        """Wait for no word any more."""
        for task in self._sending:
            task.cancel()

    def _sent(self, task: asyncio.Task[object]) -> None:
        self._sending.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.debug("work that was through is not confirmed: %s", task.exception())
