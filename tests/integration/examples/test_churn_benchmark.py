"""The benchmark of faults judges as it says: what a fault cost in seconds and in loss, whom kills strike, and when."""

from __future__ import annotations

import pytest
from parts.chaos_swarm import Story
from parts.churn_course import RESTART_SECONDS, kills, num_steps, speed
from parts.fault_course import Stretch, gap
from parts.faults import FaultKind


def stretch(*steps_at: float, struck_at: float = 10.0, loss: float = 2.0) -> Stretch:
    story = Story(steps_at=list(steps_at), faults_at=[struck_at])
    return Stretch(story=story, loss=loss, equal=True)


CALM = stretch(1.0, 2.0, 3.0)


def test_seconds_lost_are_those_beyond_the_usual_steps_after_the_fault() -> None:
    row = stretch(9.0, 10.0, 14.0, 15.0, 16.0).row(CALM)
    assert row == {"went_on": True, "seconds_lost": 2.0, "survivors_equal": True, "loss_gap": 0.0}


def test_steps_that_are_faster_than_usual_lose_nothing() -> None:
    assert stretch(9.0, 10.0, 10.5, 11.0).row(CALM)["seconds_lost"] == 0.0


def test_a_step_long_after_the_fault_is_not_going_on() -> None:
    assert not stretch(9.0, 26.0, struck_at=10.0).row(CALM)["went_on"]


def test_a_gap_is_a_part_of_the_undisturbed_loss_and_signed() -> None:
    assert gap(2.04, 2.0) == pytest.approx(0.02)
    assert gap(1.96, 2.0) == pytest.approx(-0.02)


def test_kills_take_one_host_after_another_at_their_pace() -> None:
    plan = kills(0, ["a", "b", "c"], 30.0, 4)
    assert [(fault.name, fault.at) for fault in plan.faults] == [("a", 0.0), ("b", 30.0), ("c", 60.0), ("a", 90.0)]
    assert {(fault.kind, fault.seconds) for fault in plan.faults} == {(FaultKind.KILL, RESTART_SECONDS)}


def test_speed_leaves_out_the_first_step() -> None:
    assert speed(Story(steps_at=[100.0, 101.0, 103.0]), tokens_per_step=30.0) == 20.0


def test_a_slow_machine_still_makes_steps_enough_to_tell_a_speed() -> None:
    assert num_steps(12.0, 0.5) == 24
    assert num_steps(12.0, 20.0) == 6
