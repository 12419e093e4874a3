"""How long a group is waited for, learnt from the groups before."""

from __future__ import annotations

from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from averaging.arrivals import Arrivals

FIRST, LEAST, MOST = 1.0, 0.8, 30.0


def after(*seconds: float) -> Arrivals:
    arrivals = Arrivals(first=FIRST, least=LEAST, most=MOST)
    for each in seconds:
        arrivals.saw(each, is_full=True)
    return arrivals


def test_before_anything_is_learnt_the_window_is_the_setting():
    assert after().window() == FIRST


def test_a_steady_swarm_waits_a_little_longer_than_usual():
    assert after(1.0, 1.0, 1.0).window() == pytest.approx(1.0 + 4 * 0.1)
    assert after(5.0).window() == pytest.approx(5.4)


@settings(max_examples=50)
@given(st.lists(st.floats(0, 20), min_size=1, max_size=20))
def test_the_window_is_the_median_and_four_deviations_within_its_bounds(seen):
    middle = median(seen)
    spread = 1.4826 * median([abs(each - middle) for each in seen])
    expected = middle + 4 * max(spread, 0.1)
    assert after(*seen).window() == pytest.approx(min(MOST, max(LEAST, expected)))


def test_one_late_group_in_ten_changes_next_to_nothing_where_a_mean_would_move():
    usual = [1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.0, 1.0, 1.1]
    assert after(*usual, 29.0).window() == pytest.approx(after(*usual).window(), abs=0.2)


def test_a_swarm_that_varies_waits_longer_than_a_steady_one():
    assert after(1.0, 2.0, 3.0).window() == pytest.approx(2.0 + 4 * 1.4826)
    assert after(1.0, 2.0, 3.0).window() > after(2.0, 2.0, 2.0).window()


def test_a_peer_that_never_comes_at_most_doubles_the_window_and_a_full_group_brings_it_back():
    arrivals = after(0.6, 0.6, 0.6)
    windows = []
    for _ in range(10):
        windows.append(arrivals.window())
        arrivals.saw(arrivals.window(), is_full=False)
    assert windows == sorted(windows)
    assert windows[:2] == pytest.approx([1.0, 1.25])
    assert arrivals.window() == pytest.approx(2.0)
    arrivals.saw(0.6, is_full=True)
    assert arrivals.window() == pytest.approx(1.0)


def test_the_window_stays_within_its_bounds():
    assert after(0.0).window() == LEAST
    assert after(500.0).window() == MOST


def test_only_the_last_twenty_rounds_count():
    """Ten of the last twenty were slow, and eleven of the last twenty-one quick."""
    assert after(*[1.0] * 11, *[25.0] * 10).window() == MOST
    assert after(*[1.0] * 11, *[25.0] * 9).window() == pytest.approx(1.4)
    assert after(*[1.0] * 30, *[25.0] * 11).window() == pytest.approx(25.4)
