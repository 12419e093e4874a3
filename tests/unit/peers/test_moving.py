"""Who moves, and when: gaps at once and by one peer alone, balance rarely and for a gain, and nobody opens a gap."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks.errors import BadSpan
from blocks.spans import Span
from peers.network import PeerId
from peers.placing.moving import Move, MovingRules, Turn, next_move, still_right
from peers.placing.standing import Standing
from peers.placing.throughput import best_throughput, throughput
from tests.unit.peers.standings import covered, host, hosts, moved, promised, random_swarm

NOW = 10_000.0
RULES = MovingRules()


def can_fill(standings: Sequence[Standing], num_blocks: int) -> bool:
    """Whether anybody has room for a block that nobody holds, beside those that only it holds; by trying everything."""
    for one in standings:
        rest = covered([other for other in standings if other is not one])
        for start in range(num_blocks):
            for end in range(start + 1, min(num_blocks, start + one.capacity) + 1):
                span = set(range(start, end))
                if not one.pinned and set(one.span.blocks()) - span <= rest and span - rest - set(one.span.blocks()):
                    return True
    return False


def settle(standings: Sequence[Standing], num_blocks: int, most: int = 60) -> tuple[list[Standing], list[Move]]:
    """The swarm when nobody moves any more, and the moves; each is checked to open no gap and to cost no throughput."""
    now, moves, swarm = NOW, list[Move](), list(standings)
    while (move := next_move(swarm, num_blocks, now)) is not None:
        before, tokens = covered(swarm), throughput(swarm, num_blocks)
        swarm = moved(swarm, move, now)
        assert before <= covered(swarm)
        assert throughput(swarm, num_blocks) >= tokens * (1 - 1e-6)
        moves.append(move)
        assert len(moves) <= most, moves
        now += 1000
    return swarm, moves


# gaps


def test_the_redundant_holder_moves_to_the_blocks_that_nobody_holds() -> None:
    swarm = hosts([(0, 5), (0, 5), (5, 10)])
    move = next_move(swarm, 15, NOW)
    assert move is not None
    assert (move.span, move.reason) == (Span(10, 15), "gap")
    assert move.leaves == Span(0, 5)
    assert still_right(move, promised(swarm, (move, NOW)), 15, NOW)


def test_of_two_who_could_go_the_one_with_which_the_swarm_is_faster_goes() -> None:
    swarm = [
        host("a", Span(0, 5), 10.0),
        host("b", Span(0, 5), 2.0),
        host("c", Span(0, 5), 6.0),
        host("d", Span(5, 10), 9.0),
    ]
    move = next_move(swarm, 15, NOW)
    assert move is not None
    # Afterwards the least is 8/5 with a or c in the gap, and 2/5 with b; with c the others keep 12.
    found = {one: throughput(moved(swarm, replace(move, peer=PeerId(one)), NOW), 15) for one in "abc"}
    assert found[move.peer] == max(found.values()) > found["b"]


def test_who_can_hold_the_gap_beside_its_own_blocks_keeps_them() -> None:
    swarm = [host("a", Span(0, 5), 10.0), host("b", Span(0, 5), 10.0), host("c", Span(5, 10), 13.0, 10)]
    move = next_move(swarm, 12, NOW)
    assert move is not None
    assert (move.peer, move.span) == ("c", Span(5, 12))
    assert move.widens
    # Not if the swarm is much slower by that.
    slow = [*swarm[:2], replace(swarm[2], block_rate=8.0)]
    assert (move := next_move(slow, 12, NOW)) is not None
    assert not move.widens


def test_nobody_moves_who_is_pinned_promised_loading_or_passed_over() -> None:
    swarm = hosts([(0, 5), (0, 5)])
    first = next_move(swarm, 10, NOW)
    assert first is not None
    for kept in (
        [replace(one, pinned=True) for one in swarm],
        [replace(one, serving=False) for one in swarm],
        promised(swarm, *((replace(first, peer=one.peer, span=Span(4, 9)), NOW) for one in swarm)),
    ):
        assert next_move(kept, 10, NOW) is None
    second = next_move(swarm, 10, NOW, passed_over={first.peer})
    assert second is not None
    assert {first.peer, second.peer} == {"a", "b"}
    assert next_move(swarm, 10, NOW, passed_over={"a", "b"}) is None  # type: ignore[arg-type]


def test_who_cannot_leave_its_blocks_to_one_that_is_only_loading_them_waits() -> None:
    swarm = [host("a", Span(0, 5)), host("b", Span(0, 5), moves_to=Span(0, 5), serving=False)]
    assert next_move(swarm, 10, NOW) is None
    assert next_move([swarm[0], replace(swarm[1], serving=True, moves_to=None)], 10, NOW) is not None


def test_one_takes_over_blocks_so_that_another_is_free_to_fill_the_gap() -> None:
    swarm = [host("a", Span(0, 10), capacity=15), host("b", Span(10, 20), capacity=10)]
    first = next_move(swarm, 25, NOW)
    assert first is not None
    assert (first.peer, first.span, first.reason) == ("a", Span(0, 15), "room")
    assert still_right(first, promised(swarm, (first, NOW)), 25, NOW)
    second = next_move(moved(swarm, first, NOW), 25, NOW)
    assert second is not None
    assert (second.peer, second.span, second.reason) == ("b", Span(15, 25), "gap")


def test_every_placement_of_four_on_four_blocks_is_mended_as_far_as_one_move_at_a_time_can() -> None:
    spans = [(start, end) for start in range(4) for end in range(start + 1, 5) if end - start <= 3]
    for chosen in itertools.combinations_with_replacement(spans, 4):
        swarm = hosts(chosen, capacity=3)
        move = next_move(swarm, 4, NOW)
        if len(covered(swarm)) < 4:
            assert (move is not None) == can_fill(swarm, 4) or move.reason == "room", chosen
        assert covered(settle(swarm, 4)[0]) == {0, 1, 2, 3}, chosen


def test_a_model_of_one_block_needs_one_host_and_none_ever_moves() -> None:
    assert next_move(hosts([(0, 1), (0, 1), (0, 1)]), 1, NOW) is None
    assert next_move([], 1, NOW) is None
    with pytest.raises(BadSpan, match="0 blocks"):
        next_move([], 0, NOW)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 10))
def test_a_gap_is_filled_whenever_anybody_has_room_and_no_move_opens_one(seed: int, peers: int, blocks: int) -> None:
    swarm = random_swarm(seed, peers, blocks)
    move = next_move(swarm, blocks, NOW)
    shuffled = random.Random(seed).sample(swarm, len(swarm))
    assert next_move(shuffled, blocks, NOW) == move
    if len(covered(swarm)) < blocks:
        direct = move is not None and move.reason == "gap"
        assert direct == can_fill(swarm, blocks)
    if move is not None:
        after = moved(swarm, move, NOW)
        assert covered(swarm) <= covered(after)
        assert len(move.span) <= next(one.capacity for one in swarm if one.peer == move.peer)
        assert still_right(move, promised(swarm, (move, NOW)), blocks, NOW)
        if move.reason == "gap":
            assert covered(swarm) < covered(after)
            # While the mover waits and loads, nobody else is sent to the same blocks.
            other = next_move(promised(swarm, (move, NOW)), blocks, NOW)
            assert other is None or other.reason != "gap" or not set(other.span.blocks()) <= covered(after)
    settle(swarm, blocks)


# balance


def test_an_uneven_swarm_is_evened_out_by_one_move_at_a_time_and_then_stands() -> None:
    swarm = hosts([(0, 10)] * 6 + [(10, 20)] + [(20, 30)])
    swarm, moves = settle(swarm, 30)
    assert 2 <= len(moves) <= 6
    assert throughput(swarm, 30) >= 0.9 * best_throughput(swarm, 30)
    assert all(next_move(swarm, 30, NOW + hour * 3600) is None for hour in range(24, 48))


def test_two_equally_weak_places_are_strengthened_one_after_the_other() -> None:
    swarm = [host(f"a{place}", Span(0, 1)) for place in range(9)]
    swarm += [host("b", Span(1, 2)), host("c", Span(2, 3), 9.0, pinned=True), host("d", Span(3, 4))]
    after, moves = settle(swarm, 4)
    assert {move.span for move in moves} == {Span(1, 2), Span(3, 4)}
    assert throughput(after, 4) >= 3 > throughput(swarm, 4) == 1


def test_a_good_placement_is_left_alone() -> None:
    assert next_move(hosts([(0, 15), (15, 30)] * 2), 30, NOW) is None
    assert next_move(hosts([(0, 30)] * 3), 30, NOW) is None
    uneven = hosts([(0, 15), (15, 30), (0, 15)])
    assert [move.span for move in settle(uneven, 30)[1]] == [Span(5, 20)]  # a third of each for everybody


def test_balance_waits_until_the_mover_has_stood_and_the_swarm_has_settled() -> None:
    swarm = hosts([(0, 10)] * 6 + [(10, 20)] * 2)
    assert next_move(swarm, 20, NOW) is not None
    young = [replace(one, since=NOW - RULES.stand_seconds + 1) for one in swarm]
    assert next_move(young, 20, NOW) is None
    assert next_move(young, 20, NOW + 1) is not None
    just_moved = [*swarm[:-1], replace(swarm[-1], moved=True, since=NOW)]
    share = throughput(swarm, 20) / best_throughput(swarm, 20)
    wait = RULES.cooldown_seconds * share
    assert next_move(just_moved, 20, NOW + wait - 0.1) is None
    assert next_move(just_moved, 20, NOW + wait + 0.1) is not None
    newcomer = [*swarm[:-1], replace(swarm[-1], since=NOW)]
    assert next_move(newcomer, 20, NOW) is not None


def test_for_balance_two_holders_stay_at_every_block_that_is_left() -> None:
    swarm = [host(name, Span(0, 10), 50.0) for name in "ab"] + [host(name, Span(10, 20), 1.0) for name in "cd"]
    assert next_move(swarm, 20, NOW) is None
    third = [*swarm, host("e", Span(0, 10), 50.0)]
    assert next_move(third, 20, NOW) is not None


def test_a_gain_that_is_smaller_than_what_a_host_brings_is_not_worth_a_move() -> None:
    swarm = hosts([(0, 10)] * 4 + [(10, 20)] * 2)
    assert next_move(swarm, 20, NOW) is not None
    assert next_move(swarm, 20, NOW, rules=MovingRules(gain=10.0)) is None


def test_rules_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="gain above 0"):
        MovingRules(gain=0.0)
    with pytest.raises(ValueError, match="shares from 0 to 1"):
        MovingRules(shortfall=1.0)
    with pytest.raises(ValueError, match="negative"):
        MovingRules(settle_seconds=-1.0)


# two at once


def test_of_two_that_promise_to_leave_the_same_block_none_goes_and_of_three_the_others_wait() -> None:
    swarm = [*hosts([(0, 5), (0, 5), (5, 10)])]
    a = Move(peer=PeerId("a"), leaves=Span(0, 5), span=Span(10, 15), reason="gap")
    b = replace(a, peer=PeerId("b"))
    both = promised(swarm, (a, NOW), (b, NOW + 1))
    assert not still_right(b, both, 15, NOW + 5)
    assert not still_right(a, both, 15, NOW + 5)
    # Whatever their clocks say: who sees the other's promise stays, and one of them does as each wrote before it read.
    assert still_right(a, promised(swarm, (a, NOW + 9)), 15, NOW + 5)
    three = [*swarm, host("d", Span(0, 5))]
    assert still_right(a, promised(three, (a, NOW), (b, NOW + 1)), 15, NOW + 5)
    assert not still_right(b, promised(three, (a, NOW), (b, NOW + 1)), 15, NOW + 5)


def test_a_move_is_off_when_the_gap_is_filled_the_place_is_needed_or_the_record_is_another() -> None:
    swarm = hosts([(0, 5), (0, 5), (5, 10)])
    move = next_move(swarm, 15, NOW)
    assert move is not None
    fresh = promised(swarm, (move, NOW))
    assert still_right(move, fresh, 15, NOW)
    assert not still_right(move, [*fresh, host("z", Span(10, 15))], 15, NOW)
    assert not still_right(move, [one for one in fresh if one.peer == move.peer or one.span != move.leaves], 15, NOW)
    assert not still_right(move, [one for one in fresh if one.peer != move.peer], 15, NOW)
    assert not still_right(move, swarm, 15, NOW)


def test_a_move_for_balance_is_off_when_another_came_first_or_there_is_nothing_to_gain_any_more() -> None:
    swarm = hosts([(0, 10)] * 6 + [(10, 20)] * 2)
    move = next_move(swarm, 20, NOW)
    assert move is not None
    assert move.reason == "balance"
    assert still_right(move, promised(swarm, (move, NOW)), 20, NOW)
    other = replace(move, peer=next(one.peer for one in swarm if one.span == move.leaves and one.peer != move.peer))
    both = promised(swarm, (move, NOW), (other, NOW + 1))
    assert still_right(move, both, 20, NOW + 4)
    assert not still_right(other, both, 20, NOW + 4)
    evened = [*swarm, *(host(name, Span(10, 20)) for name in "wxyz")]
    assert not still_right(move, promised(evened, (move, NOW)), 20, NOW)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 8), st.integers(2, 8), st.integers(0, 200), st.booleans())
def test_peers_that_see_different_records_never_open_a_gap_together(
    seed: int, peers: int, blocks: int, hidden: int, late: bool
) -> None:
    """Two elect themselves from views that each lack somebody; each then sees the other's promise, or came first."""
    swarm = [replace(one, pinned=False) for one in random_swarm(seed, peers, blocks)]
    views = [[one for place, one in enumerate(swarm) if place != (hidden + skip) % peers] for skip in (0, 1)]
    moves = [next_move(view, blocks, NOW) for view in views]
    present = {one.peer: one for one in swarm}
    going = {move.peer: (move, NOW + place) for place, move in enumerate(moves) if move is not None}
    promises = [(move, at) for move, at in going.values() if present[move.peer].span == move.leaves]
    after = list(swarm)
    for place, (move, _) in enumerate(promises):
        if still_right(move, promised(swarm, *(promises[: place + 1] if late else promises)), blocks, NOW + 4):
            after = moved(after, move, NOW)
    assert covered(swarm) <= covered(after)


def test_who_was_elected_and_does_nothing_is_passed_over() -> None:
    swarm = hosts([(0, 5), (0, 5)])
    turn, elected = Turn(), list[str]()
    for second in range(0, 60, 5):
        move = next_move(swarm, 10, NOW + second, passed_over=turn.passed_over)
        turn = turn.after(move, NOW + second)
        elected.append(move.peer if move else "nobody")
    first, second_one = elected[0], elected[5]
    assert {first, second_one} == {"a", "b"}
    assert elected == [first] * 5 + [second_one] * 5 + ["nobody", first]


def test_a_turn_ends_when_nobody_is_needed() -> None:
    move = Move(peer=PeerId("a"), leaves=Span(0, 5), span=Span(5, 10), reason="gap")
    turn = Turn().after(move, NOW)
    assert turn.after(None, NOW + 30) == Turn()
    assert turn.after(replace(move, peer=PeerId("b")), NOW + 30).since == NOW + 30
