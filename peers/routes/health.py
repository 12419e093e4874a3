"""Who may be asked now: failed calls, back-off, probes and bans. Pure rules; the clock comes from outside.

A failed call takes a peer out of the routing graph at once, whatever its record says, until it answers a probe. What
cannot be an accident (values that cannot be right) bans it for a time that doubles with each offence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from peers.errors import DIAL_BACKOFF
from peers.network import PeerId

# How long after a failure a peer is asked again, by how many it has had. After each dial that fails libp2p dials an
# address no more for 5 s and k^2 s, k being how many have failed: two early probes are for peers that are connected,
# and those after it must be rare, or whoever comes back finds the door shut. That it is back its next record tells.
PROBE_AFTER_SECONDS = (1.0, 2.0, 7.0, 21.0, 63.0, 189.0, 567.0, 1800.0, 3600.0)
_NEXT_ADDRESS = " * ["  # in what libp2p says of several
FIRST_BAN_SECONDS = 60.0
LONGEST_BAN_SECONDS = 6 * 3600.0
FORGIVEN_AFTER_SECONDS = 24 * 3600.0
MAX_PEERS = 16384


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerHealth:
    """What is known of one peer. Moments are seconds of the caller's monotonic clock."""

    failures: int = 0
    probe_at: float = 0.0
    bans: int = 0
    banned_until: float = 0.0
    last_seen: float | None = None
    reason: str = ""

    def is_usable(self, now: float) -> bool:
        """Whether calls may go to the peer."""
        return self.failures == 0 and now >= self.banned_until

    def wants_probe(self, now: float) -> bool:
        """Whether it is out for failures, and the time has come to ask whether it is back."""
        return self.failures > 0 and now >= self.probe_at and now >= self.banned_until


def after_failure(health: PeerHealth, *, now: float, reason: str) -> PeerHealth:
    """A call or a probe failed: out until a probe succeeds, which each failure puts off for longer.

    What fails before it is asked again is the same incident. Where libp2p did not even dial, the reason from when it
    last did stays.
    """
    if health.failures and reason.endswith(DIAL_BACKOFF) and _NEXT_ADDRESS not in reason:
        reason = health.reason
    if health.failures and now < health.probe_at:
        return replace(health, reason=reason)
    wait_seconds = PROBE_AFTER_SECONDS[min(health.failures, len(PROBE_AFTER_SECONDS) - 1)]
    return replace(health, failures=health.failures + 1, probe_at=now + wait_seconds, reason=reason)


def after_answer(health: PeerHealth, *, now: float) -> PeerHealth:
    """The peer answered: back in. A ban stays until it is over."""
    return replace(health, failures=0, probe_at=0.0, last_seen=now, reason=health.reason if health.bans else "")


def after_offence(health: PeerHealth, *, now: float, reason: str) -> PeerHealth:
    """The peer sent what cannot be right: banned, twice as long as the last time unless that was a day ago."""
    bans = 0 if health.bans and now > health.banned_until + FORGIVEN_AFTER_SECONDS else health.bans
    ban_seconds = min(FIRST_BAN_SECONDS * 2 ** min(bans, 30), LONGEST_BAN_SECONDS)
    return replace(health, bans=bans + 1, banned_until=now + ban_seconds, reason=reason)


class Health:
    """The states of all peers. Bounded: forgets first whoever is usable and was heard from longest ago."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._peers: dict[PeerId, PeerHealth] = {}

    def of(self, peer: PeerId) -> PeerHealth:
        """What is known of `peer`; a stranger is healthy."""
        return self._peers.get(peer, PeerHealth())

    def failed(self, peer: PeerId, reason: str) -> None:
        """A call to `peer`, or a probe of it, failed."""
        self._keep(peer, after_failure(self.of(peer), now=self._clock(), reason=reason))

    def answered(self, peer: PeerId) -> None:
        """`peer` answered a call or a probe."""
        self._keep(peer, after_answer(self.of(peer), now=self._clock()))

    def offended(self, peer: PeerId, reason: str) -> None:
        """`peer` sent what cannot be right."""
        self._keep(peer, after_offence(self.of(peer), now=self._clock(), reason=reason))

    def is_usable(self, peer: PeerId) -> bool:
        """Whether calls may go to `peer` now."""
        return self.of(peer).is_usable(self._clock())

    def is_banned(self, peer: PeerId) -> bool:
        """Whether `peer` is refused, also when it calls."""
        return self._clock() < self.of(peer).banned_until

    def to_probe(self) -> list[PeerId]:
        """Who should be asked now whether it is back, longest due first."""
        now = self._clock()
        due = [(health.probe_at, peer) for peer, health in self._peers.items() if health.wants_probe(now)]
        return [peer for _, peer in sorted(due)]

    def unusable(self) -> Mapping[PeerId, str]:
        """Who is out now, and why."""
        now = self._clock()
        return {peer: health.reason for peer, health in self._peers.items() if not health.is_usable(now)}

    def _keep(self, peer: PeerId, health: PeerHealth) -> None:
        self._peers[peer] = health
        if len(self._peers) > MAX_PEERS:
            now = self._clock()
            others = (other for other in self._peers if other != peer)
            oldest = min(others, key=lambda p: (not self._peers[p].is_usable(now), self._peers[p].last_seen or 0.0))
            del self._peers[oldest]
