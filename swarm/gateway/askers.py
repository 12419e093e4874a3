"""How much each asker does: requests in the last minute, and requests at the same time. Pure but for the clock."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from swarm.gateway.failures import BUSY_SECONDS, ApiFailure
from swarm.gateway.keys import AskerLimits

_MAX_ASKERS = 10_000


@dataclass(slots=True)
class _Asker:
    """A bucket that holds a minute's requests when full, and how many requests are open."""

    left: float
    filled_at: float
    open: int = 0


class Askers:
    """Counts by name. Forgets first who has nothing open and asked longest ago."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._askers: OrderedDict[str, _Asker] = OrderedDict()

    def __len__(self) -> int:
        """How many are remembered."""
        return len(self._askers)

    @contextmanager
    def asking(self, name: str, limits: AskerLimits) -> Iterator[None]:
        """One request of an asker, from its beginning to its end.

        Raises:
            ApiFailure: 429, it asks too often, or too much at the same time.
        """
        asker = self._find(name, limits)
        if limits.concurrent is not None and asker.open >= limits.concurrent:
            why = f"{asker.open} requests of this key are open, as many as it may have; wait for one to end"
            raise ApiFailure(429, why, "too_many_open_requests", retry_seconds=BUSY_SECONDS)
        if limits.requests_per_minute is not None:
            self._take(asker, limits.requests_per_minute)
        asker.open += 1
        try:
            yield
        finally:
            asker.open -= 1

    def _take(self, asker: _Asker, per_minute: int) -> None:
        if asker.left < 1:
            wait = math.ceil((1 - asker.left) * 60 / per_minute)
            why = f"this key may ask {per_minute} times a minute; try again in {wait} s"
            raise ApiFailure(429, why, "rate_limit_exceeded", retry_seconds=wait)
        asker.left -= 1

    def _find(self, name: str, limits: AskerLimits) -> _Asker:
        now, most = self._clock(), float(limits.requests_per_minute or 0)
        asker = self._askers.get(name)
        if asker is None:
            asker = self._askers[name] = _Asker(most, now)
            self._forget()
        self._askers.move_to_end(name)
        asker.left = min(most, asker.left + (now - asker.filled_at) * most / 60)
        asker.filled_at = now
        return asker

    def _forget(self) -> None:
        if len(self._askers) > _MAX_ASKERS:
            idle = next((name for name, asker in self._askers.items() if not asker.open), None)
            if idle is not None:
                del self._askers[idle]
