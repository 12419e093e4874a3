"""The throughput of a placement, next to what the definition gives, and the bound on the best placement."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks.errors import BadSpan
from blocks.spans import Span
from peers.placing.standing import Standing
from peers.placing.throughput import best_throughput, even_levels, flows, rates_inside, spans_of, throughput
from tests.unit.peers.standings import host, random_swarm


def by_definition(standings: Sequence[Standing], num_blocks: int) -> float:
    """The least, over all sets of blocks, of their holders' rate by their number."""
    sets = (chosen for size in range(1, num_blocks + 1) for chosen in itertools.combinations(range(num_blocks), size))
    return min(
        sum(one.block_rate for one in standings if any(block in one.goal for block in chosen)) / len(chosen)
        for chosen in sets
    )


def test_replicas_add_up_and_the_weaker_half_is_what_counts() -> None:
    halves = [host("a", Span(0, 5), 10.0), host("b", Span(5, 10), 20.0)]
    assert throughput(halves, 10) == pytest.approx(2.0)
    assert throughput([*halves, host("c", Span(0, 5), 5.0)], 10) == pytest.approx(3.0)


def test_a_host_between_two_helps_both() -> None:
    three = [host("a", Span(0, 15)), host("b", Span(15, 30)), host("c", Span(8, 23))]
    assert throughput(three, 30) == pytest.approx(3 / 30)
    assert even_levels(spans_of(three), 30).min() == pytest.approx(1 / 15)


def test_a_block_without_a_host_means_no_throughput_at_all() -> None:
    assert throughput([], 4) == 0
    assert throughput([host("a", Span(0, 3), 1e6 / 3)], 4) == 0
    assert throughput([host("a", Span(0, 3), 0.1), host("b", Span(2, 4), 0.7)], 5) == 0
    assert throughput([host("a", Span(0, 1))], 1) == 1


def test_a_number_of_blocks_that_no_model_has_is_refused() -> None:
    for ask in (throughput, best_throughput):
        with pytest.raises(BadSpan, match="0 blocks"):
            ask([host("a", Span(0, 1))], 0)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 7))
def test_throughput_is_what_the_definition_says(seed: int, num_peers: int, num_blocks: int) -> None:
    swarm = random_swarm(seed, num_peers, num_blocks)
    assert throughput(swarm, num_blocks) == pytest.approx(by_definition(swarm, num_blocks), rel=1e-6, abs=1e-12)
    assert even_levels(spans_of(swarm), num_blocks).min() <= throughput(swarm, num_blocks) * (1 + 1e-9)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6))
def test_many_placements_at_once_give_what_each_gives_alone_and_blocks_may_be_left_out(seed: int, size: int) -> None:
    swarms = [random_swarm(seed + place, 4, size) for place in range(3)]
    inside = np.stack([rates_inside(spans_of(swarm), size) for swarm in swarms])
    assert flows(inside, np.ones((3, size))) == pytest.approx([throughput(swarm, size) for swarm in swarms])
    without_last = np.ones((3, size))
    without_last[:, -1] = 0
    first = [[one for one in swarm if one.span.start < size - 1] for swarm in swarms]
    shorter = [
        [host(one.peer, Span(one.span.start, min(one.span.end, size - 1)), one.block_rate) for one in swarm]
        for swarm in first
    ]
    assert flows(inside, without_last) == pytest.approx([throughput(swarm, size - 1) for swarm in shorter])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.1, 50), st.integers(1, 3)), min_size=1, max_size=3),
    st.integers(1, 5),
)
def test_no_placement_exceeds_the_bound(devices: list[tuple[float, int]], num_blocks: int) -> None:
    every = [
        [
            host(str(place), Span(start, end), rate, capacity)
            for start in range(num_blocks)
            for end in range(start + 1, min(num_blocks, start + capacity) + 1)
        ]
        for place, (rate, capacity) in enumerate(devices)
    ]
    best = best_throughput([choices[0] for choices in every], num_blocks)
    found = max(throughput(list(swarm), num_blocks) for swarm in itertools.product(*every))
    assert found <= best * (1 + 1e-9)
    assert (best == 0) == (found == 0)


def test_the_bound_is_reached_where_everybody_has_room_for_all_and_knows_small_memories_and_pins() -> None:
    assert best_throughput([host("a", Span(0, 1), 3.0, 4), host("b", Span(0, 1), 5.0, 4)], 4) == pytest.approx(2.0)
    # b is of use for one block only, so a does at least three.
    assert best_throughput([host("a", Span(0, 1), 3.0, 4), host("b", Span(0, 1), 50.0, 1)], 4) == pytest.approx(1.0)
    pinned = host("b", Span(0, 1), 50.0, 4, pinned=True)
    assert best_throughput([host("a", Span(0, 1), 3.0, 4), pinned], 4) == pytest.approx(1.0)
    assert best_throughput([host("a", Span(0, 3), 3.0)], 4) == 0
