"""Routes over the swarm as it is now: records from the directory, measured round trips, and who failed lately.

The choice itself is in `routing.py`; here is what it needs to know, kept fresh by `run()`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from blocks.spans import Span
from peers.directory import Directory
from peers.errors import NoRoute, PeerLost, Refused, reason_of
from peers.network import PeerId
from peers.published.catalogue import Published
from peers.records import PeerRecord
from peers.routes.adapter_router import AdapterRouter
from peers.routes.health import Health
from peers.routes.paces import Paces
from peers.routes.routing import (
    EVERYBODY,
    Hop,
    HostView,
    RouteRules,
    is_usable_by,
    kept_apart,
    pick_fast,
    pick_spread,
    views_of,
)
from peers.streams.messages import AskInfo, InfoReply, StreamKind
from peers.streams.pool import Pool

logger = logging.getLogger(__name__)

_SLOW = 2.0
_MEASURED_SECONDS = 30.0  # after which a round trip is measured again
_MEASURED_AT_ONCE = 8
_TOLD_SECONDS = 10.0  # for which what a host told of itself goes before an older record; by then the directory has it


class Router(Protocol):
    """Where to send work."""

    paces: Paces
    """What this peer's own work has shown of hosts, for whoever does the work to write into."""

    async def spread(self, span: Span, num_tokens: int) -> tuple[Hop, ...]:
        """A chain for one microbatch of training. Waits for one; NoRoute at its deadline."""

    async def fast(self, span: Span, avoid: frozenset[PeerId] = frozenset()) -> tuple[Hop, ...]:
        """The chain with the least time for one text. Waits for one; NoRoute at its deadline."""

    def is_slow(self, hop: Hop) -> bool:
        """Whether others would do this part of a text in less than half the time."""

    def with_adapter(self, adapter: Published) -> Router:
        """For texts with a published adapter: only through hosts that serve it."""

    def failed(self, peer: PeerId, reason: str) -> None:
        """A call failed: leave this peer out until it answers a probe."""

    async def refused(self, hop: Hop, reason: str) -> None:
        """A host would not do what its record offers: read its record anew; one that offers it still has failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    """The run and its blocks; how often the directory is read, how long a caller waits for a route, and a probe takes.

    A caller that waits says so in the log after `refresh_seconds`, and again every `tell_seconds`.

    `rules` say whom this peer never, or exclusively, routes through.
    """

    run: str
    whole: Span
    rules: RouteRules = EVERYBODY
    refresh_seconds: float = 3.0
    retry_seconds: float = 0.5
    wait_seconds: float = 300.0
    tell_seconds: float = 20.0
    probe_seconds: float = 3.0

    def __post_init__(self) -> None:
        if min(self.refresh_seconds, self.retry_seconds, self.wait_seconds, self.tell_seconds, self.probe_seconds) <= 0:
            raise ValueError("the router's times must be positive")


async def is_there(pool: Pool, peer: PeerId, *, seconds: float) -> bool:
    """Whether a peer answers at all, also one that serves nothing yet."""
    try:
        await pool.call(peer, StreamKind.INFO, AskInfo(), seconds=seconds)
    except PeerLost:
        return False
    except Refused:
        return True
    return True


class LiveRouter:
    """Implements Router over a directory. Start `run()` in a task group, or call `refresh()`."""

    def __init__(
        self,
        directory: Directory,
        pool: Pool,
        config: RouterConfig,
        *,
        rng: random.Random,
        clock: Callable[[], float] = time.monotonic,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """`check` raises what keeps this peer itself from ever finding a route; it is asked while one is waited for."""
        self.health, self.paces = Health(clock), Paces(clock)
        self.records: tuple[PeerRecord, ...] = ()
        self.found: tuple[PeerRecord, ...] = ()
        """All records of the last look, also of peers that load, or are away."""
        self._directory, self._pool = directory, pool
        if config.rules.allow is not None:  # whoever names others means them beside itself
            rules = replace(config.rules, allow=frozenset(config.rules.allow) | {pool.me})
            config = replace(config, rules=rules)
        self._config, self._rng, self._clock = config, rng, clock
        self._rtt_seconds: dict[PeerId, float] = {}
        self._measured_at: dict[PeerId, float] = {}
        self._announced: dict[PeerId, float] = {}  # of who failed: the life of the record that stood then
        self._told: dict[PeerId, tuple[PeerRecord, float]] = {}  # what hosts said of themselves when asked, and when
        self._refreshing = asyncio.Lock()
        self._check = check

    async def run(self) -> None:
        """Keep the view fresh and ask after those who failed, until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(self._config.refresh_seconds)

    async def refresh(self) -> None:
        """Read the directory, measure the newly seen, probe the failed."""
        async with self._refreshing:
            self._know(await self._directory.find_hosts(self._config.run, self._config.whole))
            asked = dict.fromkeys([*self._to_measure(), *self.health.to_probe(), *self._announced_anew()])
            await asyncio.gather(*(self._probe(peer) for peer in asked))

    async def check(self, peers: Collection[PeerId]) -> None:
        """Ask all of `peers` whether they are there; who does not answer is out until it does."""
        await asyncio.gather(*(self._probe(peer) for peer in peers if peer != self._pool.me))

    async def spread(self, span: Span, num_tokens: int) -> tuple[Hop, ...]:
        """See Router."""

        def pick(rules: RouteRules) -> tuple[Hop, ...]:
            return pick_spread(self.views(), span, num_tokens=num_tokens, rng=self._rng, rules=rules)

        return await self.wait_for(pick, frozenset())

    async def fast(self, span: Span, avoid: frozenset[PeerId] = frozenset()) -> tuple[Hop, ...]:
        """See Router."""
        return await self.wait_for(lambda rules: pick_fast(self.views(), span, rules=rules), avoid)

    def with_adapter(self, adapter: Published) -> Router:
        """See Router."""
        return AdapterRouter(self, adapter)

    def is_slow(self, hop: Hop, views: list[HostView] | None = None) -> bool:
        """See Router; among `views`, all hosts if they are not given."""
        views_by_peer = {view.peer: view for view in (self.views() if views is None else views)}
        here = views_by_peer.get(hop.peer)
        if here is None:
            return False
        out = frozenset(self.health.unusable()) | frozenset(self._config.rules.avoid) | {hop.peer}
        try:
            others = pick_fast(list(views_by_peer.values()), hop.span, rules=replace(self._config.rules, avoid=out))
        except NoRoute:
            return False
        seconds = sum(views_by_peer[other.peer].seconds_for(other.span, 1) for other in others)
        return _SLOW * seconds < here.seconds_for(hop.span, 1)

    def failed(self, peer: PeerId, reason: str) -> None:
        """See Router."""
        self.health.failed(peer, reason)
        self._announced[peer] = self._announcements().get(peer, 0.0)

    async def refused(self, hop: Hop, reason: str) -> None:
        """See Router. A host that moves or steps back says so in its record, which this peer may not have read yet."""
        await self._probe(hop.peer)
        offers = any(record.peer == hop.peer and record.span.covers(hop.span) for record in self.records)
        if offers and self.health.is_usable(hop.peer):
            self.failed(hop.peer, reason)

    async def wait_for(
        self, pick: Callable[[RouteRules], tuple[Hop, ...]], avoid: frozenset[PeerId]
    ) -> tuple[Hop, ...]:
        """What `pick` finds under the rules of now; again while it raises NoRoute, until this router's deadline."""
        deadline = self._clock() + self._config.wait_seconds
        tell_at = self._clock() + self._config.refresh_seconds
        while True:
            out = frozenset(self.health.unusable()) | avoid | frozenset(self._config.rules.avoid)
            try:
                return pick(replace(self._config.rules, avoid=out))
            except NoRoute as error:
                self._check()
                if self._clock() >= deadline:
                    waited = f"waited {self._config.wait_seconds:.0f} s"
                    raise NoRoute(f"{error} ({waited}; {self._excuses()})") from error
                if self._clock() >= tell_at:
                    tell_at = self._clock() + self._config.tell_seconds
                    left = deadline - self._clock()
                    logger.warning("waiting, at most %.0f s more: %s; %s", left, error, self._excuses())
            await self.refresh()
            await asyncio.sleep(self._config.retry_seconds)

    def views(self, only: Callable[[PeerRecord], bool] = lambda _: True) -> list[HostView]:
        """The hosts whose record passes, as this peer sees them."""
        records = [record for record in self.records if only(record)]
        views = [self.paces.seen(view) for view in views_of(records, self._rtt_seconds)]
        return kept_apart(views, self._pool.me, self._config.rules.keep_first)

    def _excuses(self) -> str:
        out = [reason_of(peer, reason) for peer, reason in list(self.health.unusable().items())[:3]]
        return "; ".join(out) if out else f"{len(self.records)} hosts are known"

    def _to_measure(self) -> list[PeerId]:
        """Hosts whose round trip was never measured, or longest ago; those that are out are probed for that."""
        self._rtt_seconds.setdefault(self._pool.me, 0.0)
        due = self._clock() - _MEASURED_SECONDS
        usable = {record.peer for record in self.records if self.health.is_usable(record.peer)} - {self._pool.me}
        old = sorted(
            (self._measured_at.get(peer, float("-inf")), peer)
            for peer in usable
            if self._measured_at.get(peer, due - 1.0) < due
        )
        new = [peer for _, peer in old if peer not in self._measured_at]
        return new + [peer for _, peer in old if peer in self._measured_at][:_MEASURED_AT_ONCE]

    def _announcements(self) -> dict[PeerId, float]:
        """Until when each peer's newest record lives, whatever it does in the run: later with each announcement."""
        return {record.peer: record.expires_at for record in self.found}

    def _announced_anew(self) -> list[PeerId]:
        """Who is out and has announced itself since: a sign of life, so it is asked without waiting for its turn."""
        now, health = self._announcements(), self.health
        self._announced = {peer: until for peer, until in self._announced.items() if health.of(peer).failures}
        anew = [peer for peer, until in self._announced.items() if now.get(peer, until) > until]
        return [peer for peer in anew if not health.is_banned(peer)]

    def _know(self, found: Iterable[PeerRecord]) -> None:
        """Take over records that were found; where a host itself has told a newer one, that."""
        heard_since = self._clock() - _TOLD_SECONDS
        self._told = {peer: (record, at) for peer, (record, at) in self._told.items() if at > heard_since}
        newest = {record.peer: record for record in found}
        for peer, (record, _) in self._told.items():
            if peer not in newest or newest[peer].expires_at < record.expires_at:
                newest[peer] = record
        self.found = tuple(newest[peer] for peer in sorted(newest))
        self.records = tuple(record for record in self.found if is_usable_by(record, self._pool.me))

    async def _probe(self, peer: PeerId) -> None:
        began = self._measured_at[peer] = self._clock()
        try:
            answer = await self._pool.call(peer, StreamKind.INFO, AskInfo(), seconds=self._config.probe_seconds)
        except (PeerLost, Refused) as error:
            self.failed(peer, str(error))
            return
        if isinstance(answer.message, InfoReply):
            if not answer.message.record:
                # It was started again and is loading; the record that names it as a host is of its life before.
                self.failed(peer, f"peer {peer} does not serve its blocks yet")
                return
            told = self._directory.read_host(self._config.run, peer, answer.message.record)
            if told is not None:
                self._told[peer] = told, self._clock()
                self._know(self.found)
        self.health.answered(peer)
        self._rtt_seconds[peer] = self._clock() - began
