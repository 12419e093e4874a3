"""Where texts are asked for: so many are written at once, so many more wait, and the next is refused.

Texts are written in threads; everything here runs on the server's loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import torch

from blocks.decoding.speculation import PLAIN, Speculation
from swarm.gateway.failures import BUSY_SECONDS, ApiFailure
from swarm.gateway.writing import Ended, Event, Failed, Piece, TextRequest, Writing
from swarm.interrupt import Interrupted

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 10.0
_FEW_TEXTS = 4  # to which guesses ahead save round trips; for 64, on a tiny model, they halved the tokens per second


@dataclass(frozen=True, kw_only=True, slots=True)
class DeskLimits:
    """How many texts are written at once, how many wait at most and how long, and how long one may take in all."""

    writing: int = 64
    waiting: int = 128
    wait_seconds: float = 60.0
    text_seconds: float = 600.0

    def __post_init__(self) -> None:
        if self.writing < 1 or self.waiting < 0 or min(self.wait_seconds, self.text_seconds) <= 0:
            raise ValueError(f"{self} lets nobody write; use larger limits")


class Observer:
    """Is told what happens to texts; metrics are made of it. Does nothing itself."""

    def first_token(self, request: TextRequest, seconds: float) -> None:
        """A text's first token came so long after it was asked for."""

    def ended(self, request: TextRequest, end: Ended) -> None:
        """A text is complete."""

    def failed(self, request: TextRequest, error: BaseException) -> None:
        """A text ended too early."""


@dataclass(eq=False)
class _Job:
    """One text of an order."""

    request: TextRequest
    writing: Writing
    began: float
    has_place: bool = False
    has_ended: bool = False
    is_late: bool = False
    task: asyncio.Task[None] | None = None


class Order:
    """The texts of one request. `events` gives (which text, event) until each has ended or failed."""

    def __init__(self) -> None:
        self._jobs: list[_Job] = []
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()  # as many as the texts may have tokens

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Each event once, in order of each text."""
        left = len(self._jobs)
        while left:
            number, event = await self._queue.get()
            left -= isinstance(event, (Ended, Failed))
            yield number, event

    def cancel(self) -> None:
        """End what is being written and what waits; hosts' caches are freed. Safe to call twice."""
        for job in self._jobs:
            job.writing.interrupt.set()
            if job.task is not None and not job.has_place:
                job.task.cancel()


class Desk:
    """Takes orders. `close` ends all texts. Tokens are guessed ahead, as `speculation` says, while texts are few."""

    def __init__(
        self,
        limits: DeskLimits,
        observer: Observer,
        *,
        speculation: Speculation = PLAIN,
        num_threads: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits, self._observer, self._speculation, self._clock = limits, observer, speculation, clock
        self._places = asyncio.Semaphore(limits.writing)
        self._open: set[_Job] = set()
        self._threads = ThreadPoolExecutor(
            limits.writing,
            thread_name_prefix="text",
            initializer=None if num_threads is None else lambda: torch.set_num_threads(num_threads),
        )

    @property
    def writing(self) -> int:
        """How many texts are being written."""
        return sum(job.has_place for job in self._open)

    @property
    def waiting(self) -> int:
        """How many texts wait for others to end."""
        return len(self._open) - self.writing

    def order(self, requests: Sequence[TextRequest]) -> Order:
        """Begin the texts of one request.

        Raises:
            ApiFailure: 429, too many are being written and wait already.
        """
        if len(self._open) + len(requests) > self._limits.writing + self._limits.waiting:
            why = f"{self.writing} texts are being written here and {self.waiting} wait; try again later"
            raise ApiFailure(429, why, "too_many_texts", retry_seconds=BUSY_SECONDS)
        order = Order()
        for number, request in enumerate(requests):
            order._jobs.append(self._begin(order, number, request))
        return order

    async def close(self) -> None:
        """End all texts and wait for their threads, for a bounded time."""
        jobs = list(self._open)
        for job in jobs:
            job.writing.interrupt.set()
            if job.task is not None and not job.has_place:
                job.task.cancel()
        tasks = [job.task for job in jobs if job.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=_CLOSE_SECONDS)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _begin(self, order: Order, number: int, request: TextRequest) -> _Job:
        loop = asyncio.get_running_loop()

        def arrived(event: Event) -> None:
            if isinstance(event, Piece) and event.is_first:
                self._observer.first_token(request, self._clock() - job.began)
            if isinstance(event, Ended):
                job.has_ended = True
                self._observer.ended(request, event)
            order._queue.put_nowait((number, event))

        def tell(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(arrived, event)

        def done(task: asyncio.Task[None]) -> None:
            """A task that is cancelled before its first step never runs, so all is put in order here."""
            self._open.discard(job)
            if job.has_place:
                self._places.release()
            error = Interrupted("the text was ended before it began") if task.cancelled() else task.exception()
            if error is not None and not job.has_ended:
                self._observer.failed(request, error)
                order._queue.put_nowait((number, Failed(error)))

        job = _Job(request, Writing(request, tell), self._clock())
        self._open.add(job)
        job.task = asyncio.create_task(self._run(job), name=f"text {number}")
        job.task.add_done_callback(done)
        return job

    async def _run(self, job: _Job) -> None:
        """One text from its place in the queue to its end."""
        loop, limits = asyncio.get_running_loop(), self._limits
        try:
            async with asyncio.timeout(limits.wait_seconds):
                await self._places.acquire()
                job.has_place = True
        except TimeoutError as error:
            why = f"other texts were being written here for {limits.wait_seconds:.0f} s; try again later"
            raise ApiFailure(429, why, "too_many_texts", retry_seconds=BUSY_SECONDS) from error

        def expire() -> None:
            job.is_late = True
            job.writing.interrupt.set()

        timer = loop.call_later(limits.text_seconds, expire)
        try:
            speculation = self._speculation if self.writing <= _FEW_TEXTS else PLAIN
            await loop.run_in_executor(self._threads, self._work, job, speculation)
        except Interrupted as error:
            if job.is_late:
                why = f"the text was not complete after {limits.text_seconds:.0f} s; ask for a shorter one"
                raise ApiFailure(504, why, "too_slow") from error
            raise
        finally:
            timer.cancel()

    def _work(self, job: _Job, speculation: Speculation) -> None:
        """In a thread.

        Raises:
            Interrupted: the text was ended before it was complete.
        """
        if not job.writing.interrupt.is_set:
            with job.request.served.models().lend() as model:
                job.writing.write(model, speculation)
        else:
            raise Interrupted("the text was ended before it began")
