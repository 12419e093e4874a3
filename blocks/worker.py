"""The one thread that runs torch. Jobs go by priority, then by arrival; the event loop never computes."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from enum import IntEnum
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Priority(IntEnum):
    """Lower goes first. Decoding has a person waiting; a backward pass frees memory that a forward pass takes."""

    DECODE = 0
    STEP = 1
    BACKWARD = 2
    FORWARD = 3
    EVALUATE = 4
    CLOSE = 9


class _Job(Generic[T]):
    """One call and the future that its caller waits for."""

    def __init__(self, call: Callable[[], T]) -> None:
        self.call = call
        self.future: Future[T] = Future()

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.call())
        except BaseException as error:  # handed to whoever waits, never lost
            self.future.set_exception(error)


class ComputeThread:
    """A worker thread for torch with a priority queue.

    `num_threads` is torch's intra-op thread count inside the worker; None leaves torch's own choice. Several peers
    on one machine thrash unless it is set.
    """

    def __init__(self, name: str = "compute", *, num_threads: int | None = None) -> None:
        self._jobs: queue.PriorityQueue[tuple[int, int, _Job[object] | None]] = queue.PriorityQueue()
        self._order = itertools.count()
        self._num_threads = num_threads
        self._closed = False
        self._closing = threading.Lock()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, priority: Priority, call: Callable[[], T]) -> Future[T]:
        """Queue `call`; the future carries its result or its exception.

        Raises:
            RuntimeError: the thread was closed.
        """
        job = _Job(call)
        with self._closing:  # else a job could come after the last one and never run
            if self._closed:
                raise RuntimeError("the compute thread is closed")
            self._jobs.put((priority, next(self._order), job))  # type: ignore[arg-type]  # Queue is invariant
        return job.future

    async def run(self, priority: Priority, call: Callable[[], T]) -> T:
        """Like submit, for the event loop. Cancelling the caller cancels a job that has not begun."""
        return await asyncio.wrap_future(self.submit(priority, call))

    def backlog(self) -> int:
        """How many jobs wait."""
        return self._jobs.qsize()

    def close(self) -> None:
        """Finish what is queued, then end the thread. Safe to call twice."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._jobs.put((Priority.CLOSE, next(self._order), None))
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=60)

    def _work(self) -> None:
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        while True:
            _, _, job = self._jobs.get()
            if job is None:
                return
            job.run()
            del job  # it may hold a graph, and the next job may be far away
