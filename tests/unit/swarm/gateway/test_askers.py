"""Limits of those who ask: requests a minute, and at the same time."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from swarm.gateway import askers
from swarm.gateway.askers import Askers
from swarm.gateway.failures import ApiFailure
from swarm.gateway.keys import AskerLimits


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def ask(counted: Askers, name: str, limits: AskerLimits) -> ApiFailure | None:
    try:
        with counted.asking(name, limits):
            return None
    except ApiFailure as failure:
        return failure


def test_a_minutes_requests_may_come_at_once_and_more_come_evenly() -> None:
    clock = Clock()
    counted, limits = Askers(clock), AskerLimits(requests_per_minute=6)
    assert [ask(counted, "ann", limits) for _ in range(6)] == [None] * 6
    refused = ask(counted, "ann", limits)
    assert refused is not None
    assert (refused.status, refused.code, refused.retry_seconds) == (429, "rate_limit_exceeded", 10)
    assert ask(counted, "bob", limits) is None, "another's requests are another's"
    clock.now = 9.9
    assert ask(counted, "ann", limits) is not None
    clock.now = 10.1
    assert ask(counted, "ann", limits) is None
    assert ask(counted, "ann", limits) is not None
    clock.now = 1000
    assert [ask(counted, "ann", limits) is None for _ in range(7)] == [True] * 6 + [False], "nothing is saved up"


def test_requests_at_the_same_time_are_bounded_and_given_back_also_after_errors() -> None:
    counted, limits = Askers(Clock()), AskerLimits(concurrent=2)
    with ExitStack() as open_ones:
        for _ in range(2):
            open_ones.enter_context(counted.asking("ann", limits))
        refused = ask(counted, "ann", limits)
        assert refused is not None
        assert (refused.status, refused.code) == (429, "too_many_open_requests")
        assert ask(counted, "bob", limits) is None
    assert ask(counted, "ann", limits) is None
    with pytest.raises(ZeroDivisionError), counted.asking("ann", limits):
        raise ZeroDivisionError
    with counted.asking("ann", limits), counted.asking("ann", limits):
        pass


def test_a_refused_request_takes_nothing() -> None:
    counted, limits = Askers(Clock()), AskerLimits(requests_per_minute=2, concurrent=1)
    with counted.asking("ann", limits):
        for _ in range(5):
            assert ask(counted, "ann", limits) is not None
    assert ask(counted, "ann", limits) is None


def test_without_limits_everything_is_allowed_and_many_askers_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(askers, "_MAX_ASKERS", 3)
    counted = Askers(Clock())
    limits = AskerLimits(requests_per_minute=1)
    with counted.asking("busy", limits):
        for number in range(20):
            assert ask(counted, f"other {number}", AskerLimits()) is None
        assert len(counted) <= 4
        assert ask(counted, "busy", limits) is not None, "who has a request open is remembered"
