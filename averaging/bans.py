"""Whom this peer does not average with, and for how long. Pure: the caller passes in the time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from peers.network import PeerId

_FIRST_SECONDS = 60.0
_MOST_SECONDS = 24 * 3600.0
_FORGIVEN_AFTER = 4.0  # times the last ban, once it is over: then the next offence counts as the first
_MAX_PEERS = 1024
_MOST_MISSES = 3  # in a row: a peer that is killed misses once and comes to no other round
_LEAST_COMPANY = 3  # of two, each could only say that it was the other


@dataclass(frozen=True, slots=True)
class Ban:
    """A ban for the `strikes`-th offence, over at `until` (seconds of the caller's clock)."""

    strikes: int
    until: float
    seconds: float


class Bans:
    """Peers that most holders of a class have accused: out for a minute, twice as long each further time."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._bans: dict[PeerId, Ban] = {}

    def strike(self, peers: Iterable[PeerId]) -> dict[PeerId, Ban]:
        """These peers have offended; their bans."""
        now = self._now()
        made = {}
        for peer in peers:
            last = self._bans.get(peer)
            strikes = 1
            if last is not None and now < last.until + _FORGIVEN_AFTER * last.seconds:
                strikes = last.strikes + 1
            seconds = min(_MOST_SECONDS, _FIRST_SECONDS * 2 ** min(strikes - 1, 30))
            made[peer] = self._bans[peer] = Ban(strikes=strikes, until=now + seconds, seconds=seconds)
        if len(self._bans) > _MAX_PEERS:
            for peer in sorted(self._bans, key=lambda each: self._bans[each].until)[: len(self._bans) - _MAX_PEERS]:
                del self._bans[peer]
        return made

    def banned(self) -> frozenset[PeerId]:
        """Those who are out now."""
        now = self._now()
        return frozenset(peer for peer, ban in self._bans.items() if now < ban.until)


class Misses:
    """Because of whom classes failed, round after round: such a peer comes to rounds and keeps all others from theirs,
    as one that nobody can dial though it says so, whose line is too slow for its part, or who says no where all others
    say yes.
    """

    def __init__(self) -> None:
        self._in_a_row: dict[PeerId, int] = {}

    def saw(self, present: Collection[PeerId], missing: Collection[PeerId]) -> frozenset[PeerId]:
        """A round with these peers, of whom some could not finish; who has done so too often, and is counted anew."""
        if len(present) < _LEAST_COMPANY:
            return frozenset()
        counts = {peer: self._in_a_row.get(peer, 0) + 1 for peer in present if peer in missing}
        over = frozenset(peer for peer, count in counts.items() if count >= _MOST_MISSES)
        self._in_a_row = {peer: count for peer, count in counts.items() if peer not in over}
        return over
