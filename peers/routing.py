"""Choosing a chain of hosts that covers a span. Pure: no clock, no network, chance comes from outside.

Two objectives: the least time for one request (generation), and the earliest end of a piece of work among others of
this peer (training), by which replicas share the work in proportion to their speed.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from blocks.spans import Span
from peers.errors import NoRoute
from peers.network import PeerId
from peers.records import PeerRecord

STEP_TOKENS = 32  # up to here a pass costs about the same: it reads all weights once, however few the tokens
DEFAULT_RTT_SECONDS = 0.05  # for a peer that was never measured: a continent away
_Label: TypeAlias = tuple[int, float, tuple[tuple[PeerId, int], ...]]  # missed pins, seconds, (peer, end) of each hop
_ALIKE = 1.5  # times the least cost
_SLOWEST_TOKENS_PER_SECOND = 1e-3  # a record may say 0: usable, but only where nobody else is


@dataclass(frozen=True, kw_only=True, slots=True)
class Hop:
    """One call of a chain: `peer` computes `span`, which may be part of what it holds."""

    peer: PeerId
    span: Span


@dataclass(frozen=True, kw_only=True, slots=True)
class HostView:
    """A host as one peer sees it. `tokens_per_second` is through all of `span`; the rest is in seconds.

    `step_seconds` is what a block takes in a pass of up to STEP_TOKENS, if that is known; `working` counts pieces of
    this peer's own work that are with the host now.
    """

    peer: PeerId
    span: Span
    tokens_per_second: float
    queue_seconds: float = 0.0
    rtt_seconds: float = DEFAULT_RTT_SECONDS
    step_seconds: float | None = None
    working: int = 0

    def seconds_for(self, span: Span, num_tokens: int) -> float:
        """Time of one call: there and back, the queue, and the blocks of `span` at this host's speed."""
        if self.step_seconds is not None and num_tokens <= STEP_TOKENS:
            return self.rtt_seconds + self.queue_seconds + self.step_seconds * len(span)
        speed = max(self.tokens_per_second, _SLOWEST_TOKENS_PER_SECOND) * len(self.span)  # blocks x tokens each second
        return self.rtt_seconds + self.queue_seconds + (1 + self.working) * num_tokens * len(span) / speed


@dataclass(frozen=True, kw_only=True, slots=True)
class RouteRules:
    """Whom a chain may use. `allow` None is everybody; `pins` are hosts to prefer for the blocks that they hold."""

    allow: Collection[PeerId] | None = None
    avoid: Collection[PeerId] = ()
    pins: Collection[PeerId] = field(default=())

    def admits(self, peer: PeerId) -> bool:
        """Whether a chain may use `peer` at all."""
        return peer not in self.avoid and (self.allow is None or peer in self.allow)


EVERYBODY = RouteRules()


def is_usable_by(record: PeerRecord, me: PeerId) -> bool:
    """Whether chains of the peer `me` may lead through a record's peer: hosts, and what `me` holds for itself."""
    return "host" in record.roles or ("holder" in record.roles and record.peer == me)


def views_of(records: Sequence[PeerRecord], measured_rtt_seconds: Mapping[PeerId, float]) -> list[HostView]:
    """Hosts as seen from here: what they announce, with the round-trip times measured by this peer. All are usable."""
    return [
        HostView(
            peer=record.peer,
            span=record.span,
            tokens_per_second=record.tokens_per_second,
            queue_seconds=record.queue_seconds,
            rtt_seconds=measured_rtt_seconds.get(record.peer, DEFAULT_RTT_SECONDS),
        )
        for record in records
    ]


def pick_fast(
    hosts: Sequence[HostView], span: Span, *, num_tokens: int = 1, rules: RouteRules = EVERYBODY
) -> tuple[Hop, ...]:
    """The chain over `span` with the least total time for `num_tokens`: Dijkstra over block boundaries.

    Pinned hosts are used for as many blocks as they can serve; among chains that do so, the fastest wins. Ties go to
    the smaller peer ids, so that the answer depends on nothing else.

    Raises:
        NoRoute: some blocks have no admitted host; the message names them.
    """
    usable = _usable(hosts, span, rules)
    pinned = _pinned_before(usable, span, rules)
    queue: list[_Label] = [(0, 0.0, ())]
    best: dict[int, _Label] = {span.start: queue[0]}
    while queue:
        label = heapq.heappop(queue)
        unpinned, seconds, path = label
        at = path[-1][1] if path else span.start
        if at == span.end:
            return _hops(span.start, path)
        if best[at] != label:
            continue
        for host in usable:
            if at not in host.span:
                continue
            for end in range(at + 1, min(host.span.end, span.end) + 1):
                missed = 0 if host.peer in rules.pins else pinned[end - span.start] - pinned[at - span.start]
                cost = seconds + host.seconds_for(Span(at, end), num_tokens)
                found = (unpinned + missed, cost, (*path, (host.peer, end)))
                if end not in best or found < best[end]:
                    best[end] = found
                    heapq.heappush(queue, found)
    raise NoRoute(_missing(usable, span, rules))


def pick_spread(
    hosts: Sequence[HostView],
    span: Span,
    *,
    num_tokens: int,
    rng: random.Random,
    rules: RouteRules = EVERYBODY,
) -> tuple[Hop, ...]:
    """A chain over `span` for one piece of work among many: at each boundary one of the hosts that would be done first,
    by the block, for as far as it goes; among those about alike at random, the faster the likelier.

    Hosts that have work of this peer already count that in (list scheduling, Graham 1966), so replicas share the work
    in proportion to their speed, and a slow one gets none that the others would be done with far earlier. Pinned hosts
    are taken where they hold the next block.

    Raises:
        NoRoute: some blocks have no admitted host; the message names them.
    """
    usable = _usable(hosts, span, rules)
    path: list[tuple[PeerId, int]] = []
    at = span.start
    while at < span.end:
        choices = [host for host in usable if at in host.span]
        if not choices:
            raise NoRoute(_missing(usable, span, rules))
        choices = [host for host in choices if host.peer in rules.pins] or choices
        ends = [min(choice.span.end, span.end) for choice in choices]
        costs = [
            host.seconds_for(Span(at, end), num_tokens) / (end - at) for host, end in zip(choices, ends, strict=True)
        ]
        bound = _ALIKE * min(costs)
        alike = [place for place, cost in enumerate(costs) if cost <= bound]
        chosen = rng.choices(alike, weights=[1 / max(1e-9, costs[place]) for place in alike])[0]
        host, end = choices[chosen], ends[chosen]
        if host.peer not in rules.pins:
            # A pinned host takes over where it begins: its cache or its stash is there.
            starts = [other.span.start for other in usable if other.peer in rules.pins and at < other.span.start < end]
            end = min([end, *starts])
        path.append((host.peer, end))
        at = end
    return _hops(span.start, path)


def missing_blocks(hosts: Sequence[HostView], span: Span, rules: RouteRules = EVERYBODY) -> list[Span]:
    """The parts of `span` that no admitted host holds."""
    held = {block for host in hosts if rules.admits(host.peer) for block in host.span.blocks()}
    gaps: list[Span] = []
    for block in span.blocks():
        if block in held:
            continue
        if gaps and gaps[-1].end == block:
            gaps[-1] = replace(gaps[-1], end=block + 1)
        else:
            gaps.append(Span(block, block + 1))
    return gaps


def _usable(hosts: Sequence[HostView], span: Span, rules: RouteRules) -> list[HostView]:
    """Admitted hosts that hold something of `span`, by peer id."""
    near = [host for host in hosts if host.span.start < span.end and span.start < host.span.end]
    return sorted((host for host in near if rules.admits(host.peer)), key=lambda host: host.peer)


def _pinned_before(usable: Sequence[HostView], span: Span, rules: RouteRules) -> list[int]:
    """For each boundary of `span`, how many blocks before it some pinned host holds."""
    held = {block for host in usable if host.peer in rules.pins for block in host.span.blocks()}
    return list(itertools.accumulate((block in held for block in span.blocks()), initial=0))


def _hops(start: int, path: Sequence[tuple[PeerId, int]]) -> tuple[Hop, ...]:
    """Boundaries to spans; neighbours on the same host become one call."""
    hops: list[Hop] = []
    for peer, end in path:
        if hops and hops[-1].peer == peer:
            hops[-1] = replace(hops[-1], span=Span(hops[-1].span.start, end))
        else:
            hops.append(Hop(peer=peer, span=Span(start, end)))
        start = end
    return tuple(hops)


def _missing(usable: Sequence[HostView], span: Span, rules: RouteRules) -> str:
    gaps = ", ".join(str(gap) for gap in missing_blocks(usable, span, rules))
    chosen = " that you allow" if rules.allow is not None or rules.avoid else ""
    return f"no live host{chosen} holds blocks {gaps}; wait for one, or start one with --blocks {gaps.split(',')[0]}"
