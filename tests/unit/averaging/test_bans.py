"""Who is out, for how long, and when it is forgiven."""

from __future__ import annotations

import pytest

from averaging.bans import Bans, Misses
from peers.network import PeerId

ANN, BOB = PeerId("ann"), PeerId("bob")
DAY = 24 * 3600.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def bans(clock: Clock) -> Bans:
    return Bans(clock)


def test_nobody_is_out_at_first_and_no_strike_bans_nobody(bans):
    assert bans.banned() == frozenset()
    assert bans.strike([]) == {}
    assert bans.banned() == frozenset()


def test_a_first_offence_is_a_minute_to_the_second(bans, clock):
    ban = bans.strike([ANN])[ANN]
    assert (ban.strikes, ban.seconds, ban.until) == (1, 60.0, 1060.0)
    assert bans.banned() == {ANN}
    clock.now = 1059.9
    assert bans.banned() == {ANN}
    clock.now = 1060.0
    assert bans.banned() == frozenset()


def test_each_further_offence_is_twice_as_long_up_to_a_day(bans, clock):
    lengths = []
    for _ in range(40):
        ban = bans.strike([ANN])[ANN]
        lengths.append(ban.seconds)
        assert ban.until == clock.now + ban.seconds
        clock.now = ban.until
    assert lengths[:11] == [60.0 * 2**power for power in range(11)]
    assert lengths[11:] == [DAY] * 29


def test_an_offence_during_a_ban_counts_as_a_further_one(bans, clock):
    bans.strike([ANN])
    clock.now += 10
    ban = bans.strike([ANN])[ANN]
    assert (ban.strikes, ban.until) == (2, 1010.0 + 120.0)


@pytest.mark.parametrize(("waited", "strikes"), [(4 * 120.0 - 0.1, 3), (4 * 120.0, 1), (DAY, 1)])
def test_who_behaves_for_four_times_its_last_ban_begins_anew(bans, clock, waited, strikes):
    bans.strike([ANN])
    last = bans.strike([ANN])[ANN]
    assert last.seconds == 120.0
    clock.now = last.until + waited
    ban = bans.strike([ANN])[ANN]
    assert (ban.strikes, ban.seconds) == (strikes, 60.0 * 2 ** (strikes - 1))


def test_one_peers_offences_are_not_anothers(bans, clock):
    bans.strike([ANN])
    made = bans.strike([ANN, BOB])
    assert {peer: ban.strikes for peer, ban in made.items()} == {ANN: 2, BOB: 1}
    clock.now += 60
    assert bans.banned() == {ANN}


def test_the_book_is_bounded_and_lets_go_of_bans_that_end_first(bans, clock):
    bans.strike([ANN])
    bans.strike([ANN])
    crowd = [PeerId(f"peer{index}") for index in range(1023)]
    bans.strike(crowd)
    assert bans.banned() == {ANN, *crowd}
    clock.now += 1
    newest = bans.strike([PeerId(f"late{index}") for index in range(1000)])
    assert len(bans.banned()) == 1024
    assert bans.banned() >= {ANN, *newest}
    assert bans.strike([ANN])[ANN].strikes == 3, "who is let go of would begin anew"


CAT = PeerId("cat")
ALL = ANN, BOB, CAT


def test_who_keeps_the_others_from_three_rounds_in_a_row_is_named_and_counted_anew():
    misses = Misses()
    assert [misses.saw(ALL, {BOB}) for _ in range(6)] == [frozenset(), frozenset(), {BOB}] * 2


@pytest.mark.parametrize("between", [(ALL, {CAT}), (ALL, frozenset()), ((ANN, CAT, PeerId("dan")), {BOB})])
def test_a_round_that_a_peer_finishes_or_does_not_come_to_is_not_held_against_it(between):
    misses = Misses()
    found = [misses.saw(ALL, {BOB}) for _ in range(2)]
    found += [misses.saw(*between), misses.saw(ALL, {BOB}), misses.saw(ALL, {BOB})]
    assert not any(found)


def test_of_two_peers_neither_is_named():
    misses = Misses()
    assert not any(misses.saw((ANN, BOB), {BOB}) for _ in range(9))
