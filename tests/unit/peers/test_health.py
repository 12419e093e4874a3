from __future__ import annotations

import pytest

from peers.network import PeerId
from peers.routes.health import FIRST_BAN_SECONDS, LONGEST_BAN_SECONDS, PROBE_AFTER_SECONDS, Health

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
    assert tuple(waits[: len(PROBE_AFTER_SECONDS)]) == PROBE_AFTER_SECONDS
    assert waits[-1] == PROBE_AFTER_SECONDS[-1]


class Address:
    """Of a peer that is away, as libp2p dials it: for 5 s and k^2 s, at most 300, after failure number k not at all."""

    def __init__(self, now: float) -> None:
        self._failures, self._shut_until = 0, now

    def dial(self, now: float) -> None:
        if now >= self._shut_until:
            self._shut_until = now + min(5 + self._failures**2, 300)
            self._failures += 1

    def shut_seconds(self, now: float) -> float:
        return max(0.0, self._shut_until - now)


@pytest.mark.parametrize("calls", [1, 2, 4], ids="calls that failed at once: {}".format)
def test_whoever_comes_back_finds_the_door_open_or_nearly_so_however_long_it_was_away(calls: int) -> None:
    clock = Clock()
    health, address, shut = Health(clock), Address(clock.now), []
    for _ in range(calls):
        health.failed(ANN, "gone")
        address.dial(clock.now)
    began = clock.now
    while (away := clock.now - began) < 24 * 3600:
        if health.to_probe():
            address.dial(clock.now)
            health.failed(ANN, "gone")
        shut.append((away, address.shut_seconds(clock.now)))
        clock.now += 0.5
    assert all(seconds <= 5 + away / 2 for away, seconds in shut[: 2 * 60])
    assert all(seconds <= 5 + away / 8 for away, seconds in shut[2 * 60 :])
    assert sum(seconds > 0 for _, seconds in shut) < len(shut) / 4


def test_the_reason_is_why_it_could_not_be_dialled_not_that_it_is_not_being_dialled() -> None:
    health = Health(Clock())
    health.failed(ANN, "/ip4/10.0.0.1/tcp/1: dial backoff")
    assert health.unusable() == {ANN: "/ip4/10.0.0.1/tcp/1: dial backoff"}, "nothing better is known"
    health.failed(ANN, "/ip4/10.0.0.1/tcp/1: connection refused")
    health.failed(ANN, "/ip4/10.0.0.1/tcp/1: dial backoff")
    assert health.unusable() == {ANN: "/ip4/10.0.0.1/tcp/1: connection refused"}
    health.answered(ANN)
    health.failed(ANN, "/ip4/10.0.0.1/tcp/1: dial backoff")
    assert health.unusable() == {ANN: "/ip4/10.0.0.1/tcp/1: dial backoff"}


def test_of_several_addresses_what_one_said_is_news() -> None:
    health = Health(Clock())
    health.failed(ANN, "/ip4/10.0.0.1/tcp/1: timeout")
    said = "/ip4/10.0.0.1/tcp/1: connection refused * [/ip4/10.0.0.2/tcp/1] dial backoff"
    health.failed(ANN, said)
    assert health.unusable() == {ANN: said}


def test_calls_that_fail_before_it_is_asked_again_are_one_incident() -> None:
    clock = Clock()
    health = Health(clock)
    for _ in range(8):
        health.failed(ANN, "its stream ended")
    assert health.of(ANN).failures == 1
    clock.now += PROBE_AFTER_SECONDS[0]
    assert health.to_probe() == [ANN]


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
