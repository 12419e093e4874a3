"""How fast hosts have been in one peer's own work. Pure rules; the clock comes from outside.

A host's own word about its speed is from its start, and of an idle machine. So what a peer measures of it counts for
more, for as long as it is fresh; after that a host that was slow gets another chance.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from peers.network import PeerId
from peers.routes.routing import STEP_TOKENS, Hop, HostView

FRESH_SECONDS = 60.0
MAX_PEERS = 4096
_SMOOTHING = 0.3  # of the newest measurement


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """What was measured of one host: seconds for a block in a pass of few tokens, and for a token and block in others.

    `link_seconds` is what a message to it and the word that it came took, beyond its own work.
    """

    measured_at: float
    step_seconds: float | None = None
    token_seconds: float | None = None
    link_seconds: float | None = None


class Paces:
    """Measurements by host, and how much of this peer's own work each has now."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._paces: dict[PeerId, Pace] = {}
        self._working: dict[PeerId, list[int]] = {}  # how many blocks each piece of work has there

    @contextmanager
    def working(self, hops: Collection[Hop]) -> Iterator[None]:
        """Inside, a piece of this peer's work is with these hosts."""
        for hop in hops:
            self._working.setdefault(hop.peer, []).append(len(hop.span))
        try:
            yield
        finally:
            for hop in hops:
                self._working[hop.peer].remove(len(hop.span))
                if not self._working[hop.peer]:
                    del self._working[hop.peer]

    def measured(self, hop: Hop, num_tokens: int, seconds: float, link_seconds: float) -> None:
        """A host took `seconds` for its part of a pass of `num_tokens`, its queue included."""
        now = self._clock()
        known = self._known(hop.peer) or Pace(measured_at=now)
        known = replace(known, measured_at=now)
        if num_tokens <= STEP_TOKENS:
            known = replace(known, step_seconds=_blend(known.step_seconds, seconds / len(hop.span)))
        else:
            # Work of ours that came before it was part of its queue, and says nothing about the host.
            blocks = max(len(hop.span), sum(self._working.get(hop.peer, ())))
            known = replace(known, token_seconds=_blend(known.token_seconds, seconds / (blocks * num_tokens)))
        known = replace(known, link_seconds=_blend(known.link_seconds, link_seconds))
        self._paces.pop(hop.peer, None)
        self._paces[hop.peer] = known  # the newest is last
        if len(self._paces) > MAX_PEERS:
            del self._paces[next(iter(self._paces))]

    def seen(self, host: HostView) -> HostView:
        """The host as these measurements show it, instead of by its own word, and with this peer's own work at it."""
        known = self._known(host.peer)
        ahead = sum(self._working.get(host.peer, ()))
        if known is None:
            return replace(host, working=ahead)
        speed = host.tokens_per_second
        if known.token_seconds is not None:
            speed = 1 / max(1e-9, known.token_seconds * len(host.span))
        measured = known.token_seconds is not None or known.step_seconds is not None
        return replace(
            host,
            tokens_per_second=speed,
            step_seconds=known.step_seconds,
            queue_seconds=0.0 if measured else host.queue_seconds,  # it is part of what was measured
            rtt_seconds=host.rtt_seconds if known.link_seconds is None else known.link_seconds,
            working=ahead,
        )

    def _known(self, peer: PeerId) -> Pace | None:
        known = self._paces.get(peer)
        return known if known is not None and self._clock() - known.measured_at < FRESH_SECONDS else None


def _blend(before: float | None, newest: float) -> float:
    return newest if before is None else before + _SMOOTHING * (newest - before)
