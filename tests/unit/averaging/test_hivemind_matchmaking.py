"""How long matchmaking waits where the wall clock, by which moments are agreed, jumps."""

import pytest

from averaging import hivemind_matchmaking as module


@pytest.mark.parametrize(("now", "left"), [(100.0, 10.0), (104.0, 6.0), (111.0, 0.0), (-3500.0, 10.0)])
def test_a_clock_that_is_set_back_prolongs_no_wait(monkeypatch: pytest.MonkeyPatch, now: float, left: float) -> None:
    monkeypatch.setattr(module, "get_dht_time", lambda: now)
    step = module._Step(scheduled_time=104.0, deadline=110.0, data_for_gather=b"", longest=10.0)
    assert step.get_timeout() == left
