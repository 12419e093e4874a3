"""Hours of the day: every minute of many stretches against a plain count, and words that are refused."""

from datetime import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import BadConfig
from swarm.hosts.hours import MAX_STRETCHES, Hours, Stretch, parse_hours

DAY = 24 * 60
MINUTES = st.integers(0, DAY - 1)


def at(minute: int) -> time:
    return time(minute // 60 % 24, minute % 60)


def inside(hours: Hours) -> set[int]:
    return {minute for minute in range(DAY) if hours.includes(at(minute))}


def walked(begin: int, end: int) -> set[int]:
    """Every minute from one time of day to another, one step at a time."""
    found = set()
    while begin != end:
        found.add(begin)
        begin = (begin + 1) % DAY
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("22-07", walked(22 * 60, 7 * 60)),
        ("9-17", walked(9 * 60, 17 * 60)),
        ("22:30-07:15", walked(22 * 60 + 30, 7 * 60 + 15)),
        ("00-07", walked(0, 7 * 60)),
        ("22-24", walked(22 * 60, 0)),
        ("22-0", walked(22 * 60, 0)),
        ("0-00:01", {0}),
        ("23:59-0", {DAY - 1}),
        ("22-07,12-13:30", walked(22 * 60, 7 * 60) | walked(12 * 60, 13 * 60 + 30)),
        ("1-3, 2-4", walked(60, 4 * 60)),
        ("00-12,12-24", set(range(DAY))),
    ],
)
def test_exactly_the_minutes_of_the_stretches_are_inside(text: str, expected: set[int]) -> None:
    assert inside(parse_hours(text)) == expected


def test_every_stretch_of_whole_hours_is_right_around_every_hour() -> None:
    near = [minute for hour in range(24) for minute in (hour * 60, hour * 60 + 1, hour * 60 + 59)]
    for begin in range(24):
        for end in range(24):
            if begin != end:
                hours, expected = parse_hours(f"{begin:02}-{end:02}"), walked(begin * 60, end * 60)
                wrong = [minute for minute in near if hours.includes(at(minute)) != (minute in expected)]
                assert not wrong, (begin, end, wrong)


def test_seconds_belong_to_their_minute() -> None:
    assert parse_hours("22-07").includes(time(6, 59, 59, 999_999))
    assert not parse_hours("22-07").includes(time(7, 0, 0, 1))


@settings(max_examples=30)
@given(
    stretches=st.lists(st.tuples(MINUTES, MINUTES).filter(lambda ends: ends[0] != ends[1]), min_size=1, max_size=3),
    now=MINUTES,
)
def test_the_next_change_is_the_first_minute_that_differs(stretches: list[tuple[int, int]], now: int) -> None:
    hours = Hours(tuple(Stretch(*ends) for ends in stretches))
    here = inside(hours)
    change = hours.next_change(at(now))
    if len(here) == DAY:
        assert change is None
        return
    assert change is not None
    until = walked(now, change.hour * 60 + change.minute)
    assert all((minute in here) == (now in here) for minute in until)
    assert hours.includes(change) != hours.includes(at(now))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("25-07", "no time of day"),
        ("22-25", "no time of day"),
        ("22:60-07", "no time of day"),
        ("24:01-07", "no time of day"),
        ("07-07", "ends when it begins"),
        ("07:30-07:30", "ends when it begins"),
        ("0-24", "ends when it begins"),
        ("24-7", "end of the day"),
        ("22", "such as 22-07"),
        ("", "such as 22-07"),
        ("22-07,", "such as 22-07"),
        ("-1-7", "such as 22-07"),
        ("22-7pm", "such as 22-07"),
        ("22:5-7", "such as 22-07"),
        ("\u0662\u0662-\u0660\u0667", "such as 22-07"),
        ("22 - 07", "such as 22-07"),
        ("1-2," * MAX_STRETCHES + "3-4", "more than 24"),
        ("9" * 10_000, "more than 24"),
    ],
)
def test_what_is_no_stretch_of_the_day_is_refused_in_one_line(text: str, words: str) -> None:
    with pytest.raises(BadConfig, match=words) as caught:
        parse_hours(text)
    assert "--hours" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200
