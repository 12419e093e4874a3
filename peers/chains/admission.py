"""Who is let in when a host's cache is full. Pure rules: no clock, no network.

Clients take turns, and within one the first comes first. Who holds less than its share goes before who holds more; an
own flood of requests therefore delays only its sender. Sessions that are in stay in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from blocks.errors import CacheFull


@dataclass(frozen=True, kw_only=True, slots=True)
class Applicant:
    """A session that is to be opened: its place in the order of arrival, whose it is, and what it may grow to."""

    ticket: int
    client: str
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AdmissionLimits:
    """How many may wait, how much of the cache one client may hold, and how long the host lets anybody wait.

    `client_share` leaves room for newcomers while one client floods; a single session may be larger than that.

    Raises:
        ValueError: a number makes no sense.
    """

    waiting: int = 256
    waiting_of_client: int = 64
    sessions_of_client: int = 512
    client_share: float = 0.75
    wait_seconds: float = 10.0

    def __post_init__(self) -> None:
        if min(self.waiting, self.waiting_of_client, self.sessions_of_client) < 1 or self.wait_seconds < 0:
            raise ValueError(f"{self} lets nobody in; use larger limits")
        if not 0 < self.client_share <= 1:
            raise ValueError(f"a client's share of the cache is {self.client_share}; use more than 0 and at most 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """What a client has open: bytes and sessions, and when it was last let in, counted in admissions."""

    num_bytes: int = 0
    sessions: int = 0
    last: int = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class Cache:
    """The byte budget and who holds what of it."""

    budget_bytes: int
    held: Mapping[str, Held] = field(default_factory=dict)

    def of(self, client: str) -> Held:
        """What a client holds."""
        return self.held.get(client, _NOTHING)


_NOTHING = Held()


def next_in(waiting: Sequence[Applicant], cache: Cache, limits: AdmissionLimits) -> Applicant | None:
    """Whose turn it is, or None if nobody may come in, however much is free.

    It is this one's turn even if it does not fit: otherwise large sessions would wait for ever behind small ones.
    """
    allowed = [one for one in waiting if why_not_more(one, cache, limits) is None]
    if not allowed:
        return None
    clients = {one.client for one in waiting} | {client for client, held in cache.held.items() if held.sessions}
    fair_bytes = cache.budget_bytes / len(clients)

    def order(one: Applicant) -> tuple[bool, int, int]:
        held = cache.of(one.client)
        return held.sessions > 0 and held.num_bytes + one.num_bytes > fair_bytes, held.last, one.ticket

    return min(allowed, key=order)


def why_not_more(one: Applicant, cache: Cache, limits: AdmissionLimits) -> str | None:
    """Why a client has enough already; None if it may have this session too."""
    held = cache.of(one.client)
    if held.sessions >= limits.sessions_of_client:
        return f"{held.sessions} sessions of this peer are open here; try another host"
    if held.sessions and held.num_bytes + one.num_bytes > limits.client_share * cache.budget_bytes:
        return (
            f"this peer holds {held.num_bytes} of {cache.budget_bytes} bytes here and would hold more than "
            f"{limits.client_share:.0%} with {one.num_bytes}; try another host"
        )
    return None


def gives_way(newcomer: Applicant, waiting: Sequence[Applicant], limits: AdmissionLimits) -> Applicant | None:
    """Who leaves a full queue for a newcomer: the latest of the client with most in it. None where there is room.

    Raises:
        CacheFull: the newcomer may not wait; there are as many of its own client, or of every client.
    """
    counts = Counter(one.client for one in waiting)
    own = counts[newcomer.client]
    if own >= limits.waiting_of_client:
        raise CacheFull(f"{own} sessions of this peer wait to be opened here; try another host")
    if len(waiting) < limits.waiting:
        return None
    crowd, most = max(counts.items(), key=lambda item: (item[1], item[0]))
    if most < own + 2:  # else the two would only change places
        raise CacheFull(f"{len(waiting)} sessions wait to be opened here; try another host")
    return max((one for one in waiting if one.client == crowd), key=lambda one: one.ticket)
