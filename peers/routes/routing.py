"""Choosing a chain of hosts that covers a span. Pure: no clock, no network, chance comes from outside.

Two objectives: the least time for one request (generation), and the earliest end of a piece of work among others of
this peer (training), by which replicas share the work in proportion to their speed.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from blocks.checks import check_whole, refuse
from blocks.spans import MAX_BLOCKS, Span
from peers.errors import BadNetworkConfig, NoRoute
from peers.network import PeerId
from peers.records import PeerRecord

STEP_TOKENS = 32  # up to here a pass costs about the same: it reads all weights once, however few the tokens
DEFAULT_RTT_SECONDS = 0.05  # for a peer that was never measured: a continent away
_Calls: TypeAlias = "tuple[int, int, _Calls | None]"  # the last call: who, from which block, and the calls before
_ALIKE = 2.0  # times its price: by so much a host may lose or win by chance
_CROWDING = 0.25  # how much dearer a host's blocks get with each block of this peer's work that it has; simulated
_SLOWEST_TOKENS_PER_SECOND = 1e-3  # a record may say 0: usable, but only where nobody else is


@dataclass(frozen=True, kw_only=True, slots=True)
class Hop:
    """One call of a chain: `peer` computes `span`, which may be part of what it holds."""

    peer: PeerId
    span: Span


@dataclass(frozen=True, kw_only=True, slots=True)
class HostView:
    """A host as one peer sees it. `tokens_per_second` is through all of `span`; the rest is in seconds.

    `step_seconds` is what a block takes in a pass of up to STEP_TOKENS, if that is known; `working` is how many blocks
    of this peer's own work the host has now.
    """

    peer: PeerId
    span: Span
    tokens_per_second: float
    queue_seconds: float = 0.0
    rtt_seconds: float = DEFAULT_RTT_SECONDS
    step_seconds: float | None = None
    working: int = 0

    def block_seconds(self, num_tokens: int) -> float:
        """Time of one block at this host's speed."""
        if self.step_seconds is not None and num_tokens <= STEP_TOKENS:
            return self.step_seconds
        return num_tokens / (max(self.tokens_per_second, _SLOWEST_TOKENS_PER_SECOND) * len(self.span))

    def wait_seconds(self, num_tokens: int) -> float:
        """Time of one call besides its blocks: there and back, the queue, this peer's own work that is ahead of it."""
        return self.rtt_seconds + self.queue_seconds + self.working * self.block_seconds(num_tokens)

    def seconds_for(self, span: Span, num_tokens: int) -> float:
        """Time of one call for the blocks of `span`."""
        return self.wait_seconds(num_tokens) + self.block_seconds(num_tokens) * len(span)


@dataclass(frozen=True, kw_only=True, slots=True)
class RouteRules:
    """Whom a chain may use. `allow` None is everybody; `pins` are hosts to prefer for the blocks that they hold.

    The first `keep_first` blocks go through the asker itself alone (see `kept_apart`).

    Raises:
        BadNetworkConfig: a value is of the wrong kind or out of range; the message names it.
    """

    allow: Collection[PeerId] | None = None
    avoid: Collection[PeerId] = ()
    pins: Collection[PeerId] = field(default=())
    keep_first: int = 0

    def __post_init__(self) -> None:
        for name in ("allow", "avoid", "pins"):
            peers = getattr(self, name)
            is_all = name == "allow" and peers is None
            if not is_all and (isinstance(peers, str) or not isinstance(peers, Collection)):
                refuse(BadNetworkConfig, f"rules.{name}", peers, "a list of peer ids")
        check_whole(BadNetworkConfig, "rules.keep_first", self.keep_first, 0, MAX_BLOCKS)

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


def kept_apart(hosts: Sequence[HostView], me: PeerId, num_blocks: int) -> list[HostView]:
    """`hosts` as somebody sees them who gives nobody else the work of the first `num_blocks` blocks."""
    apart: list[HostView] = []
    for host in hosts:
        if host.peer == me or host.span.start >= num_blocks:
            apart.append(host)
        elif host.span.end > num_blocks:
            span = Span(num_blocks, host.span.end)
            speed = host.tokens_per_second * len(host.span) / len(span)  # it is as fast as before in each block
            apart.append(replace(host, span=span, tokens_per_second=speed))
    return apart


def pick_fast(
    hosts: Sequence[HostView], span: Span, *, num_tokens: int = 1, rules: RouteRules = EVERYBODY
) -> tuple[Hop, ...]:
    """The chain over `span` with the least total time for `num_tokens`.

    Pinned hosts are used for as many blocks as they can serve; among chains that do so, the fastest wins. Ties go to
    the smaller peer ids, so that the answer depends on nothing else.

    Raises:
        NoRoute: some blocks have no admitted host; the message names them.
    """
    usable = _usable(hosts, span, rules)
    return _cheapest(
        usable, [(host.wait_seconds(num_tokens), host.block_seconds(num_tokens)) for host in usable], span, rules
    )


def pick_spread(
    hosts: Sequence[HostView],
    span: Span,
    *,
    num_tokens: int,
    rng: random.Random,
    rules: RouteRules = EVERYBODY,
) -> tuple[Hop, ...]:
    """A chain over `span` for one piece of work among many: the cheapest, where a host's price for a block grows with
    the work of this peer that it has, and each host's prices are up to twice as high by chance.

    Prices that grow with the work spread it over all hosts as far as their spans allow (the total is lowest where no
    piece could go a cheaper way, Wardrop 1952), so replicas share it in proportion to their speed, and a slow one gets
    none that the others would be done with far earlier. Pinned hosts are taken for the blocks that they hold.

    Raises:
        NoRoute: some blocks have no admitted host; the message names them.
    """
    usable = _usable(hosts, span, rules)
    prices = []
    for host in usable:
        luck = rng.uniform(1.0, _ALIKE)
        block = host.block_seconds(num_tokens) * (1 + _CROWDING * host.working)
        prices.append((luck * (host.rtt_seconds + host.queue_seconds), luck * block))
    return _cheapest(usable, prices, span, rules)


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


@dataclass(frozen=True, slots=True)
class _Way:
    """The cheapest way so far: its cost, and where each of its calls began, the last one first."""

    cost: float
    calls: _Calls | None


def _cheapest(
    usable: Sequence[HostView], prices: Sequence[tuple[float, float]], span: Span, rules: RouteRules
) -> tuple[Hop, ...]:
    """The chain with the least sum of prices, each of a call and of every block in it: block by block, the cheapest way
    to each host as the last one.

    Raises:
        NoRoute: some blocks have no admitted host.
    """
    best = _Way(0.0, None)
    ways: dict[int, _Way] = {}  # by the place of the last host
    for block in span.blocks():
        holders = [place for place, host in enumerate(usable) if block in host.span]
        if not holders:
            raise NoRoute(_missing(usable, span, rules))
        holders = [place for place in holders if usable[place].peer in rules.pins] or holders
        reached: dict[int, _Way] = {}
        for place in holders:
            call, each = prices[place]
            stay = ways.get(place)
            if stay is not None and stay.cost <= best.cost + call:
                reached[place] = _Way(stay.cost + each, stay.calls)
            else:
                reached[place] = _Way(best.cost + call + each, (place, block, best.calls))
        ways = reached
        best = min(reached.values(), key=lambda way: way.cost)  # the first of those alike: usable is sorted
    return _hops(usable, best.calls, span.end)


def _hops(usable: Sequence[HostView], calls: _Calls | None, end: int) -> tuple[Hop, ...]:
    """Where calls began, the last one first, as hops in their order."""
    hops: list[Hop] = []
    while calls is not None:
        place, start, calls = calls
        hops.append(Hop(peer=usable[place].peer, span=Span(start, end)))
        end = start
    return tuple(reversed(hops))


def _missing(usable: Sequence[HostView], span: Span, rules: RouteRules) -> str:
    gaps = ", ".join(str(gap) for gap in missing_blocks(usable, span, rules))
    chosen = " that you allow" if rules.allow is not None or rules.avoid else ""
    return f"no live host{chosen} holds blocks {gaps}; wait for one, or start one with --blocks {gaps.split(',')[0]}"
