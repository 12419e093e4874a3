"""Lets sessions into a host's cache: at once while there is room, else in turn when something is freed, or not in time.

The rules are in admission.py. Whether a session fits is found out by opening it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from blocks.errors import CacheFull
from peers.chains.admission import AdmissionLimits, Applicant, Cache, Held, gives_way, next_in, why_not_more

_REMEMBERED = 1024  # admissions, for which a client that has nothing open any more keeps its place in the turns


@dataclass(slots=True, eq=False)
class _Place:
    """A place in the queue. `turn` is done when its owner may try, or fails when it has to leave."""

    applicant: Applicant
    session: str
    may_wait: bool
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    is_trying: bool = False
    has_failed: bool = False
    was_full: str | None = None  # what the last try said, while nothing was freed since


class Admission:
    """The door of a cache of `budget_bytes`. Use from one event loop."""

    def __init__(self, budget_bytes: int, limits: AdmissionLimits | None = None) -> None:
        self._budget_bytes, self._limits = budget_bytes, limits or AdmissionLimits()
        self._queue: dict[int, _Place] = {}  # by ticket
        self._open: dict[str, Applicant] = {}  # by session, those that are trying included
        self._held: dict[str, Held] = {}  # by client
        self._tickets = 0
        self._admitted = 0
        self._releases = 0

    @property
    def waiting(self) -> int:
        """How many sessions are at the door."""
        return len(self._queue)

    async def admit(
        self, session: str, client: str, num_bytes: int, attempt: Callable[[], Awaitable[None]], *, seconds: float
    ) -> None:
        """Open a session with `attempt` when it is its turn; `release` it when it ends.

        `attempt` raises CacheFull where there is no room, and is then called again after something was freed. It is
        given up when `seconds`, or what the host allows if that is less, have passed; 0 does not wait.

        Raises:
            CacheFull: there was no room in time, or too many wait.
        """
        seconds = min(seconds, self._limits.wait_seconds)
        self._tickets += 1
        applicant = Applicant(ticket=self._tickets, client=client, num_bytes=num_bytes)
        place = _Place(applicant, session, seconds > 0)
        self._enter(place)
        try:
            async with asyncio.timeout(seconds if place.may_wait else None):
                await self._try(place, attempt)
            place.is_trying = False
            self._admitted += 1
            self._held[client] = replace(self._held.get(client, Held()), last=self._admitted)
        except TimeoutError as error:
            raise CacheFull(f"no room came free in {seconds:g} s: {self._why(place)}") from error
        finally:
            self._queue.pop(applicant.ticket, None)
            self._stop_trying(place)
            self._call_next()

    def release(self, session: str) -> None:
        """A session has ended: what it held is free for the next."""
        self._releases += 1
        applicant = self._open.get(session)
        if applicant is not None:
            self._give_back(session, applicant)
        for place in self._queue.values():
            place.was_full = None
        since = self._admitted - _REMEMBERED if self._queue else self._admitted
        self._held = {client: held for client, held in self._held.items() if held.sessions or held.last > since}
        self._call_next()

    def _enter(self, place: _Place) -> None:
        crowded_out = gives_way(place.applicant, [one.applicant for one in self._queue.values()], self._limits)
        if crowded_out is not None:
            self._send_away(
                self._queue[crowded_out.ticket],
                "many sessions of this peer wait here, and others came; try another host",
            )
        self._queue[place.applicant.ticket] = place
        self._call_next()

    async def _try(self, place: _Place, attempt: Callable[[], Awaitable[None]]) -> None:
        while True:
            await place.turn
            releases = self._releases
            try:
                await attempt()
            except CacheFull as error:
                if not place.may_wait or place.applicant.ticket not in self._queue:
                    raise  # the second, as it gave way to others while it tried
                # What was freed while it tried came too late for this try, but not for the next.
                place.was_full, place.has_failed = str(error) if releases == self._releases else None, True
                place.turn = asyncio.get_running_loop().create_future()
                self._stop_trying(place)
                self._call_next()
                continue
            return

    def _call_next(self) -> None:
        """Let all try in order while nobody has found the cache full; from then on one by one, and none goes ahead."""
        while True:
            queue = self._queue.values()
            if any(one.has_failed for one in queue) and any(one.is_trying for one in queue):
                return
            # The turn of one that gives up is cancelled a moment before it leaves.
            waiting = [one for one in queue if not one.is_trying and not one.turn.cancelled()]
            chosen = next_in([one.applicant for one in waiting], self._cache(), self._limits)
            place = None if chosen is None else self._queue[chosen.ticket]
            if place is None or place.was_full is not None:
                break
            self._begin_trying(place)
        for place in waiting:
            if not place.may_wait:
                self._send_away(place, self._why(place))

    def _begin_trying(self, place: _Place) -> None:
        place.is_trying = True
        one = place.applicant
        self._open[place.session] = one
        held = self._held.get(one.client, Held())
        num_bytes, sessions = held.num_bytes + one.num_bytes, held.sessions + 1
        self._held[one.client] = replace(held, num_bytes=num_bytes, sessions=sessions)
        place.turn.set_result(None)

    def _stop_trying(self, place: _Place) -> None:
        """After a try that did not open the session; nothing where it did."""
        if place.is_trying:
            place.is_trying = False
            self._give_back(place.session, place.applicant)

    def _give_back(self, session: str, applicant: Applicant) -> None:
        if self._open.get(session) is not applicant:
            return  # it was released meanwhile, and its name may be another's by now
        del self._open[session]
        held = self._held[applicant.client]
        num_bytes, sessions = held.num_bytes - applicant.num_bytes, held.sessions - 1
        self._held[applicant.client] = replace(held, num_bytes=num_bytes, sessions=sessions)

    def _send_away(self, place: _Place, reason: str) -> None:
        del self._queue[place.applicant.ticket]
        if not place.turn.done():
            place.turn.set_exception(CacheFull(reason))

    def _why(self, place: _Place) -> str:
        too_much = why_not_more(place.applicant, self._cache(), self._limits)
        waiting = f"{len(self._queue)} sessions wait for room in the cache here; try another host"
        return too_much or place.was_full or waiting

    def _cache(self) -> Cache:
        return Cache(budget_bytes=self._budget_bytes, held=self._held)
