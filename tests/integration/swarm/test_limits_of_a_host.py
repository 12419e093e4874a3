"""What a volunteer allows holds for a whole peer: memory, bandwidth, hours."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from blocks.training.open_work import TrainingLimits
from swarm.errors import BadConfig
from swarm.hosts.hours import parse_hours
from swarm.hosts.loading import HostingConfig
from swarm.hosts.memory_now import taken_bytes
from swarm.reports.status import title
from tests.integration.swarm.conftest import MakeSwarm
from tests.integration.swarm.small_swarm import BACK, CACHE_BYTES, FRONT, SmallSwarm, host_of, until

MB = 10**6


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that this process takes, once and for all: other tests' threads take and give back while one runs."""
    found = taken_bytes()
    monkeypatch.setattr("swarm.hosts.holding.taken_bytes", lambda: found)
    return found


def hosting(swarm: SmallSwarm, **limits: object) -> HostingConfig:
    config = HostingConfig(cache_dir=swarm.cache_dir, num_threads=1, cache_bytes=CACHE_BYTES)
    return replace(config, **limits)  # type: ignore[arg-type]


def test_memory_bounds_weights_caches_and_work_and_too_little_is_refused(make_swarm: MakeSwarm, taken: int) -> None:
    swarm = make_swarm()
    peer = swarm.enter("ann")
    with pytest.raises(BadConfig, match=r"--max-memory 100 MB leaves no room for one block: it needs .* give at least"):
        peer.hold(None, hosting(swarm, max_memory_bytes=100 * MB))
    with pytest.raises(BadConfig, match="leaves no room for one block"):
        peer.hold(FRONT, hosting(swarm, max_memory_bytes=100 * MB))
    peer.hold(FRONT, hosting(swarm, max_memory_bytes=taken + 200 * MB))
    host = host_of(peer)
    assert 0 < host.caches.budget_bytes < CACHE_BYTES
    assert host.config.limits.held_bytes < TrainingLimits().held_bytes
    assert host.caches.budget_bytes + host.config.limits.held_bytes < 200 * MB


def test_a_bandwidth_is_that_of_all_streams_and_of_averaging(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm()
    peer = swarm.enter("ann", replace(swarm.config("ann"), max_send=2.5e6))
    swarm.hold(peer, FRONT)
    assert peer.node.traffic.limit.bytes_per_second == 2.5e6
    assert peer.node.hosting is not None
    link = peer.node.hosting.keeper._config.link
    assert link is not None
    assert link.megabits_per_second == pytest.approx(20)


def test_outside_its_hours_a_host_is_paused_from_the_start_and_begins_when_they_do(
    make_swarm: MakeSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = make_swarm()
    later = datetime.now() + timedelta(hours=2)
    hours = parse_hours(f"{later:%H:%M}-{later + timedelta(hours=1):%H:%M}")
    peer, watcher = swarm.enter("ann"), swarm.enter("watcher")
    peer.hold(FRONT, hosting(swarm, hours=hours))
    assert f"paused by --hours until {later:%H:%M}" in peer.node.line()
    status = watcher.status()
    assert status.hosts == ()
    assert [host.away for host in status.paused] == ["hours"]
    assert "1 paused" in title(status)
    assert any("paused by its --hours" in cell for row in status.rows() for cell in row)

    assert peer.node.hosting is not None
    pauser = peer.node.hosting.pauser
    monkeypatch.setattr(pauser, "switch", replace(pauser.switch, now=lambda: later))
    until(lambda: [host.peer for host in watcher.status().hosts] == [peer.id], "its hours have begun")
    assert "paused" not in peer.node.line()


def test_a_host_that_moves_has_the_memory_of_what_it_held_for_what_it_takes(
    make_swarm: MakeSwarm, monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    swarm = make_swarm()
    peer = swarm.enter("ann")
    allowed = taken + 200 * MB
    peer.hold(FRONT, hosting(swarm, max_memory_bytes=allowed))
    monkeypatch.setattr("swarm.hosts.holding.taken_bytes", lambda: allowed)  # as if the span were still there
    holding = peer.node._holding
    assert holding is not None
    assert peer.loop.run(holding.move(BACK))
    assert host_of(peer).span == BACK
