from __future__ import annotations

import heapq
import itertools
import random
import time
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks.spans import Span
from peers.errors import NoRoute
from peers.network import PeerId
from peers.placing.standing import Standing
from peers.placing.throughput import throughput
from peers.routes.routing import Hop, HostView, RouteRules, kept_apart, missing_blocks, pick_fast, pick_spread

NUM_BLOCKS = 5


def host(name: str, start: int, end: int, speed: float = 100.0, queue: float = 0.0, rtt: float = 0.01) -> HostView:
    return HostView(
        peer=PeerId(name), span=Span(start, end), tokens_per_second=speed, queue_seconds=queue, rtt_seconds=rtt
    )


@st.composite
def swarms(draw: st.DrawFn) -> list[HostView]:
    hosts = []
    for name in draw(st.lists(st.sampled_from("abcd"), max_size=4, unique=True)):
        start = draw(st.integers(0, NUM_BLOCKS - 1))
        end = draw(st.integers(start + 1, NUM_BLOCKS))
        hosts.append(
            host(name, start, end, draw(st.sampled_from([0.0, 1.0, 30.0, 500.0])), draw(st.sampled_from([0, 1])))
        )
    return hosts


def brute_force(hosts: list[HostView], span: Span, num_tokens: int, rules: RouteRules) -> tuple[int, float] | None:
    """The least (blocks not on a pinned host that could be, seconds) over all assignments of hosts to blocks."""
    by_block = [[h for h in hosts if b in h.span and rules.admits(h.peer)] for b in span.blocks()]
    costs = []
    for chosen in itertools.product(*by_block):
        missed = sum(
            h.peer not in rules.pins and any(o.peer in rules.pins for o in choices)
            for h, choices in zip(chosen, by_block, strict=True)
        )
        seconds, at = 0.0, span.start
        for h, run in itertools.groupby(chosen, key=lambda h: h):
            end = at + len(list(run))
            seconds += h.seconds_for(Span(at, end), num_tokens)
            at = end
        costs.append((missed, seconds))
    return min(costs, default=None) if all(by_block) else None


@settings(max_examples=300, deadline=None)
@given(
    swarms(), st.sampled_from([1, 100]), st.sets(st.sampled_from("abcd"), max_size=1), st.sampled_from([None, "abc"])
)
def test_the_fast_route_costs_what_brute_force_finds(
    hosts: list[HostView], num_tokens: int, pins: set[str], allow: str | None
) -> None:
    span = Span(1, 5)
    rules = RouteRules(pins={PeerId(p) for p in pins}, allow=None if allow is None else [PeerId(p) for p in allow])
    expected = brute_force(hosts, span, num_tokens, rules)
    if expected is None:
        with pytest.raises(NoRoute):
            pick_fast(hosts, span, num_tokens=num_tokens, rules=rules)
        return
    hops = pick_fast(hosts, span, num_tokens=num_tokens, rules=rules)
    by_peer = {h.peer: h for h in hosts}
    assert hops[0].span.start == span.start
    assert hops[-1].span.end == span.end
    assert all(a.span.end == b.span.start and a.peer != b.peer for a, b in itertools.pairwise(hops))
    assert all(by_peer[hop.peer].span.covers(hop.span) for hop in hops)
    assert sum(by_peer[hop.peer].seconds_for(hop.span, num_tokens) for hop in hops) == pytest.approx(expected[1])


@settings(max_examples=200, deadline=None)
@given(swarms(), st.integers(0, 1000), st.sets(st.sampled_from("abcd"), max_size=2))
def test_a_spread_route_covers_the_span_whenever_one_exists(hosts: list[HostView], seed: int, pins: set[str]) -> None:
    span = Span(0, NUM_BLOCKS)
    rules = RouteRules(pins={PeerId(p) for p in pins})
    if missing_blocks(hosts, span):
        with pytest.raises(NoRoute):
            pick_spread(hosts, span, num_tokens=100, rng=random.Random(seed), rules=rules)
        return
    hops = pick_spread(hosts, span, num_tokens=100, rng=random.Random(seed), rules=rules)
    by_peer = {h.peer: h for h in hosts}
    assert [b for hop in hops for b in hop.span.blocks()] == list(span.blocks())
    assert all(by_peer[hop.peer].span.covers(hop.span) for hop in hops)
    pinned_blocks = {b for h in hosts if h.peer in pins for b in h.span.blocks()}
    assert all(hop.peer in pins for hop in hops for b in hop.span.blocks() if b in pinned_blocks)


@pytest.mark.parametrize("trainers", [1, 3])
def test_replicas_share_the_work_in_proportion_to_speed(trainers: int) -> None:
    """Each trainer keeps 8 microbatches under way; a host computes one after the other, whosever they are."""
    speeds = {"slow": 100.0, "fast": 300.0, "tiny": 10.0}
    rng, now, taken = random.Random(5), 0.0, Counter[str]()
    free_at = dict.fromkeys(speeds, 0.0)
    under_way: list[tuple[float, int, str]] = []
    for number in range(1000):
        trainer = number % trainers if len(under_way) < 8 * trainers else -1
        if trainer < 0:
            now, trainer, _ = heapq.heappop(under_way)
        hosts = [
            replace(host(name, 0, 4, speed), working=4 * sum(who == trainer and at == name for _, who, at in under_way))
            for name, speed in speeds.items()
        ]
        chosen = str(pick_spread(hosts, Span(0, 4), num_tokens=100, rng=rng)[0].peer)
        free_at[chosen] = max(free_at[chosen], now) + 100 / speeds[chosen]
        heapq.heappush(under_way, (free_at[chosen], trainer, chosen))
        taken[chosen] += 1
    assert 2.5 < taken["fast"] / taken["slow"] < 3.5
    assert taken["tiny"] < 60
    # All are done about as fast as all hosts together could be.
    assert max(free_at.values()) < 1.15 * 1000 * 100 / sum(speeds.values())


def test_replicas_about_alike_share_what_comes_one_at_a_time() -> None:
    hosts = [host("slow", 0, 4, speed=100, rtt=0.0), host("fast", 0, 4, speed=130, rtt=0.0)]
    rng = random.Random(5)
    taken = Counter(pick_spread(hosts, Span(0, 4), num_tokens=100, rng=rng)[0].peer for _ in range(2000))
    assert 2 < taken[PeerId("fast")] / taken[PeerId("slow")] < 8


@pytest.mark.parametrize("trainers", [1, 4])
@pytest.mark.parametrize("seed", range(3))
def test_overlapping_spans_of_unlike_hosts_give_most_of_the_flow_that_they_allow(seed: int, trainers: int) -> None:
    """Enough microbatches under way, hosts that compute one after the other, and speeds over a factor of 20."""
    dice, blocks, num_hosts = random.Random(seed), 24, 16
    hosts = {}
    for number in range(num_hosts):
        length = dice.choice((3, 6, 12, 24))
        start = (number * blocks // num_hosts) if length < 24 else 0
        start = min(start, blocks - length)
        hosts[f"h{number:02}"] = host(f"h{number:02}", start, start + length, dice.choice((1.0, 4.0, 20.0)), rtt=0.001)
    rate = {name: each.tokens_per_second * len(each.span) for name, each in hosts.items()}
    standings = [
        Standing(peer=each.peer, span=each.span, capacity=len(each.span), block_rate=rate[name])
        for name, each in hosts.items()
    ]
    best = throughput(standings, blocks)
    rng, done, horizon = random.Random(seed), 0, 40 * num_hosts * 10 / best
    free_at = dict.fromkeys(hosts, 0.0)
    working = [Counter[str]() for _ in range(trainers)]
    events: list[tuple[float, int, int, tuple[Hop, ...], int]] = []
    ticks = itertools.count()

    def start_one(trainer: int, now: float) -> None:
        views = [replace(each, working=working[trainer][name]) for name, each in hosts.items()]
        hops = pick_spread(views, Span(0, blocks), num_tokens=10, rng=rng)
        for hop in hops:
            working[trainer][hop.peer] += len(hop.span)
        heapq.heappush(events, (now, next(ticks), trainer, hops, 0))

    for number in range(4 * num_hosts):
        start_one(number % trainers, 0.0)
    while events:
        now, _, trainer, hops, place = heapq.heappop(events)
        if now > horizon:
            break
        if place == len(hops):
            for hop in hops:  # as the trainer counts it: all hosts until the whole pass is done
                working[trainer][hop.peer] -= len(hop.span)
            done += now > horizon / 2
            start_one(trainer, now)
            continue
        name = str(hops[place].peer)
        free_at[name] = max(free_at[name], now) + 10 * len(hops[place].span) / rate[name]
        heapq.heappush(events, (free_at[name], next(ticks), trainer, hops, place + 1))
    assert done * 10 / (horizon / 2) > 0.65 * best


def test_one_slow_host_does_not_set_the_pace() -> None:
    hosts = [host("slow", 0, 4, speed=10), host("fast", 0, 4, speed=300)]
    rng = random.Random(1)
    for _ in range(8):
        chosen = pick_spread(hosts, Span(0, 4), num_tokens=100, rng=rng)[0].peer
        assert chosen == "fast"
        hosts[1] = replace(hosts[1], working=hosts[1].working + 4)


def test_a_step_costs_what_steps_were_seen_to_cost() -> None:
    wide = replace(host("wide", 0, 4, speed=1000, rtt=0.0), step_seconds=0.010)
    near = replace(host("near", 0, 4, speed=10, rtt=0.0), step_seconds=0.005)
    assert pick_fast([wide, near], Span(0, 4), num_tokens=4)[0].peer == "near"
    assert pick_fast([wide, near], Span(0, 4), num_tokens=400)[0].peer == "wide"


def test_a_missing_block_is_named() -> None:
    hosts = [host("a", 0, 2), host("b", 4, 6)]
    with pytest.raises(NoRoute, match=r"holds blocks 2:4, 6:8; .*--blocks 2:4"):
        pick_fast(hosts, Span(0, 8))


def test_avoided_hosts_are_not_used_and_the_message_says_so() -> None:
    hosts = [host("a", 0, 4, speed=1000), host("b", 0, 4, speed=1)]
    assert pick_fast(hosts, Span(0, 4), rules=RouteRules(avoid=[PeerId("a")]))[0].peer == "b"
    with pytest.raises(NoRoute, match="that you allow"):
        pick_fast(hosts, Span(0, 4), rules=RouteRules(allow=[PeerId("c")]))


def test_one_far_host_with_all_blocks_beats_two_near_ones_only_when_the_link_allows() -> None:
    near = [host("a", 0, 2, rtt=0.001), host("b", 2, 4, rtt=0.001)]
    assert [h.peer for h in pick_fast([*near, host("far", 0, 4, rtt=0.1)], Span(0, 4))] == ["a", "b"]
    assert [h.peer for h in pick_fast([*near, host("far", 0, 4, rtt=0.0)], Span(0, 4))] == ["far"]


def test_a_large_swarm_is_routed_quickly() -> None:
    rng = random.Random(1)
    hosts = [
        host(f"h{i:03}", s, s + 20, rng.uniform(10, 900), rtt=rng.uniform(0, 0.2)) for i in range(200) for s in [i % 81]
    ]
    began = time.perf_counter()
    pick_fast(hosts, Span(0, 100))
    assert time.perf_counter() - began < 2.0  # about 0.05 s; generous for a busy machine


@given(
    spans=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6), st.floats(1, 1000)), max_size=8),
    keep=st.integers(0, 10),
    own_end=st.integers(1, 10),
    seed=st.integers(0, 99),
)
def test_the_first_blocks_go_through_the_asker_alone_or_nowhere(
    spans: list[tuple[int, int, float]], keep: int, own_end: int, seed: int
) -> None:
    hosts = [
        HostView(peer=PeerId(f"p{number}"), span=Span(start, start + length), tokens_per_second=speed)
        for number, (start, length, speed) in enumerate(spans)
    ]
    me = HostView(peer=PeerId("me"), span=Span(0, own_end), tokens_per_second=1.0)
    apart = kept_apart([*hosts, me], me.peer, keep)
    for host in apart:
        before = next(other for other in [*hosts, me] if other.peer == host.peer)
        of_one_block = before.tokens_per_second * len(before.span)
        assert host.tokens_per_second * len(host.span) == pytest.approx(of_one_block)
    whole = Span(0, 10)
    for pick in (
        lambda: pick_fast(apart, whole),
        lambda: pick_spread(apart, whole, num_tokens=64, rng=random.Random(seed)),
    ):
        try:
            hops = pick()
        except NoRoute:
            continue
        assert all(hop.peer == me.peer or hop.span.start >= keep for hop in hops)
    if keep == 0:
        assert apart == [*hosts, me]
