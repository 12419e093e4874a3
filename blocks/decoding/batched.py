"""Steps of many decoding sessions on the one compute thread: what waits while a pass runs is computed together next.

The rules are in batching.py, the passes in cache.py. B: rows, T: new tokens, D: hidden size.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from blocks.decoding.batching import BatchLimits, Pick, Turn, Waiting, choose, seconds_to_gather
from blocks.decoding.cache import SessionCaches
from blocks.decoding.sessions import StepRequest
from blocks.errors import BadSession, BlockError, Busy
from blocks.worker import ComputeThread, Priority

MAX_WAITING = 4096  # steps; bounds what callers may pile up
_FORGET_SECONDS = 10.0
_SMOOTHING = 0.3  # of the newest measurement


@dataclass(slots=True, eq=False)
class _Job:
    """One step that waits: what is done of it, and who waits for it."""

    ticket: int
    client: str
    request: StepRequest
    future: asyncio.Future[Tensor]
    done: int = 0
    parts: list[Tensor] = field(default_factory=list)

    def waiting(self, group: object) -> Waiting:
        rows, tokens = self.request.hidden_BTD.shape[:2]
        return Waiting(
            ticket=self.ticket,
            session=self.request.session,
            client=self.client,
            group=str(group),
            rows=int(rows),
            tokens=int(tokens) - self.done,
        )

    def part(self, tokens: int) -> StepRequest:
        """The next `tokens` of the step."""
        whole, end = self.request, self.done + tokens
        if not self.done and tokens == whole.hidden_BTD.shape[1]:
            return whole
        mask_BT, ids_BT = whole.mask_BT, whole.position_ids_BT
        return StepRequest(
            session=whole.session,
            hidden_BTD=whole.hidden_BTD[:, self.done : end],
            position=whole.position + self.done,
            mask_BT=None if mask_BT is None else mask_BT[:, : whole.position + end],
            position_ids_BT=None if ids_BT is None else ids_BT[:, self.done : end],
            rows=None if self.done else whole.rows,
        )


@dataclass(slots=True)
class _Pace:
    """When a session got its last result, and how long it takes until its next step comes."""

    answered: float
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Passed:
    jobs: list[tuple[_Job, int, Tensor | Exception]]
    seconds: float
    decoding: bool


class BatchedDecoder:
    """Steps of sessions in, outputs out. Use from one event loop; the computing is on the thread."""

    def __init__(
        self,
        thread: ComputeThread,
        caches: SessionCaches,
        *,
        limits: BatchLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._thread, self._caches, self._clock = thread, caches, clock
        self._limits = limits or BatchLimits()
        self._lock = threading.Lock()  # over `_waiting` and `_turn`, which the thread looks at when a pass begins
        self._waiting: dict[int, _Job] = {}
        self._turn = Turn()
        self._tickets = itertools.count()
        self._computing = False
        self._later: asyncio.TimerHandle | None = None
        self._since = 0.0
        self._paces: dict[str, _Pace] = {}
        self._pass_seconds = 0.0
        self.passes = 0
        self.steps = 0

    async def step(self, request: StepRequest, *, client: str, deadline_seconds: float) -> Tensor:
        """What `SessionCaches.step` gives -> [B, T, D], computed together with what other sessions wait for.

        Long prompts are computed in chunks; one that is cancelled or too late may be half done, which a later step
        undoes by its position.

        Raises:
            BadSession, CacheFull: as SessionCaches.step.
            Busy: too many steps wait, or it was not this one's turn within `deadline_seconds`.
        """
        if request.hidden_BTD.dim() != 3 or request.hidden_BTD.shape[0] < 1 or request.hidden_BTD.shape[1] < 1:
            raise BadSession(f"the input is {tuple(request.hidden_BTD.shape)}; send one of (rows, tokens, hidden size)")
        if len(self._waiting) >= MAX_WAITING:
            raise Busy(f"{MAX_WAITING} steps wait here; try another host")
        job = _Job(next(self._tickets), client, request, asyncio.get_running_loop().create_future())
        self._arrived(request.session)
        with self._lock:
            self._waiting[job.ticket] = job
        self._kick()
        try:
            async with asyncio.timeout(deadline_seconds):
                return await job.future
        except TimeoutError as error:
            raise Busy(f"the step was not computed within {deadline_seconds:g} s; try another host") from error
        finally:
            with self._lock:
                self._waiting.pop(job.ticket, None)

    def forget(self, session: str) -> None:
        """Refuse what a session waits for, as it is closed."""
        self._paces.pop(session, None)
        for job in list(self._waiting.values()):
            if job.request.session == session and not job.future.done():
                job.future.set_exception(BadSession(f"session '{session[:40]}' was closed; open it again"))

    def _arrived(self, session: str) -> None:
        now = self._clock()
        if not self._waiting:
            self._since = now
        pace = self._paces.get(session)
        if pace is not None:
            taken = now - pace.answered
            pace.seconds = taken if pace.seconds is None else pace.seconds + _SMOOTHING * (taken - pace.seconds)

    def _kick(self) -> None:
        """Start a pass now, or soon, unless one runs or nothing waits."""
        if self._later is not None:
            self._later.cancel()
            self._later = None
        if self._computing or not self._waiting:
            return
        waiting = {job.request.session for job in self._waiting.values()}
        missing = [
            pace.answered + pace.seconds
            for session, pace in self._paces.items()
            if session not in waiting and pace.seconds is not None
        ]
        seconds = seconds_to_gather(self._clock(), self._since, missing, self._pass_seconds)
        if seconds > 0:
            self._later = asyncio.get_running_loop().call_later(seconds, self._start)
        else:
            self._start()

    def _start(self) -> None:
        self._later = None
        try:
            future = self._thread.submit(Priority.DECODE, self._pass)
        except RuntimeError as error:  # the thread was closed
            self._fail_all(error)
            return
        self._computing = True
        asyncio.wrap_future(future).add_done_callback(self._finish)

    def _fail_all(self, error: BaseException) -> None:
        for job in list(self._waiting.values()):
            if not job.future.done():
                job.future.set_exception(error)

    def _pass(self) -> _Passed:
        """On the thread: choose as late as possible, so that all that came meanwhile is in."""
        with self._lock:
            jobs = {ticket: job for ticket, job in self._waiting.items() if not job.future.done()}
            groups = {job.request.session: self._group(job.request.session) for job in jobs.values()}
            steps = [job.waiting(groups[job.request.session]) for job in jobs.values()]
            picks, self._turn = choose(steps, self._turn, self._limits)
        begin = self._clock()
        results: list[tuple[_Job, int, Tensor | Exception]] = []
        fit: list[tuple[_Job, Pick]] = []
        for pick in picks:
            job = jobs[pick.ticket]
            try:
                if not job.done:
                    self._caches.check(job.request)  # whole, before the first chunk of it changes anything
                fit.append((job, pick))
            except BlockError as error:
                results.append((job, pick.tokens, error))
        outputs = self._caches.step_many([job.part(pick.tokens) for job, pick in fit])
        results += [(job, pick.tokens, output) for (job, pick), output in zip(fit, outputs, strict=True)]
        decoding = bool(picks) and max(pick.tokens for pick in picks) <= self._limits.decode_tokens
        return _Passed(jobs=results, seconds=self._clock() - begin, decoding=decoding)

    def _group(self, session: str) -> object:
        """What may share a pass: sessions of one span."""
        try:
            return self._caches.state(session).span
        except BadSession:
            return None

    def _finish(self, done: asyncio.Future[_Passed]) -> None:
        """On the loop: hand out results, and begin the next pass."""
        self._computing = False
        error = RuntimeError("the compute thread was closed") if done.cancelled() else done.exception()
        if error is not None:
            self._fail_all(error)
            return
        passed = done.result()
        now = self._clock()
        self.passes += 1
        self.steps += len(passed.jobs)
        if passed.decoding:
            before = self._pass_seconds or passed.seconds
            self._pass_seconds = before + _SMOOTHING * (passed.seconds - before)
        for job, tokens, result in passed.jobs:
            self._hand_out(job, tokens, result, now)
        self._paces = {name: pace for name, pace in self._paces.items() if now - pace.answered < _FORGET_SECONDS}
        self._since = now
        self._kick()

    def _hand_out(self, job: _Job, tokens: int, result: Tensor | Exception, now: float) -> None:
        job.done += tokens
        if isinstance(result, Tensor):
            job.parts.append(result)
            if job.done < job.request.hidden_BTD.shape[1]:
                return
        with self._lock:
            self._waiting.pop(job.ticket, None)
        if job.future.done():  # its caller was cancelled or gave up
            return
        pace = self._paces.setdefault(job.request.session, _Pace(now))
        pace.answered = now
        if isinstance(result, Exception):
            job.future.set_exception(result)
        else:
            job.future.set_result(job.parts[0] if len(job.parts) == 1 else torch.cat(job.parts, 1))
