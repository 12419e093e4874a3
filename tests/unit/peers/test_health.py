from __future__ import annotations

from peers.network import PeerId
from peers.routes.health import FIRST_BAN_SECONDS, LONGEST_BAN_SECONDS, LONGEST_PROBE_SECONDS, Health

ANN, BOB = PeerId("ann"), PeerId("bob")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_failed_call_takes_a_peer_out_until_it_answers() -> None:
    clock = Clock()
    health = Health(clock)
    health.failed(ANN, "no reply in 10 s")
    assert not health.is_usable(ANN)
    assert health.is_usable(BOB)
    assert health.unusable() == {ANN: "no reply in 10 s"}
    clock.now += 1e6
    assert not health.is_usable(ANN)
    health.answered(ANN)
    assert health.is_usable(ANN)
    assert health.unusable() == {}


def test_probes_back_off_and_never_stop() -> None:
    clock = Clock()
    health = Health(clock)
    waits = []
    for _ in range(12):
        health.failed(ANN, "gone")
        assert health.to_probe() == []
        wait = health.of(ANN).probe_at - clock.now
        waits.append(wait)
        clock.now += wait
        assert health.to_probe() == [ANN]
    assert waits == sorted(waits)
    assert waits[:3] == [1.0, 2.0, 4.0]
    assert waits[-1] == LONGEST_PROBE_SECONDS


def test_bans_double_outlast_answers_and_are_forgiven_after_a_day() -> None:
    clock = Clock()
    health = Health(clock)
    health.offended(ANN, "sent nan")
    health.answered(ANN)
    assert health.is_banned(ANN)
    assert not health.is_usable(ANN)
    assert health.unusable() == {ANN: "sent nan"}
    clock.now += FIRST_BAN_SECONDS
    assert health.is_usable(ANN)
    health.offended(ANN, "sent nan again")
    assert health.of(ANN).banned_until == clock.now + 2 * FIRST_BAN_SECONDS
    for _ in range(20):
        health.offended(ANN, "and again")
    assert health.of(ANN).banned_until == clock.now + LONGEST_BAN_SECONDS
    clock.now += LONGEST_BAN_SECONDS + 24 * 3600 + 1
    health.offended(ANN, "a day later")
    assert health.of(ANN).banned_until == clock.now + FIRST_BAN_SECONDS


def test_a_banned_peer_is_not_probed() -> None:
    clock = Clock()
    health = Health(clock)
    health.failed(ANN, "gone")
    health.offended(ANN, "sent nan")
    clock.now += 30
    assert health.to_probe() == []
    clock.now += 31
    assert health.to_probe() == [ANN]
