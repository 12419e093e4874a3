"""The simulated swarm of the placement benchmark, in short runs: the targets hold, and without the rules they fail."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from blocks.spans import Span
from peers.placing.moving import MovingRules

BENCHMARKS = Path(__file__).parents[3] / "examples" / "benchmarks"


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The simulation, importable as it is for the script."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from parts import placement_swarm

    yield placement_swarm
    for name in [name for name in sys.modules if name.split(".")[0] == "parts"]:
        del sys.modules[name]


def test_two_hundred_hosts_keep_their_throughput_under_churn_and_hardly_move(simulation: ModuleType) -> None:
    found = simulation.Swarm(simulation.World(num_peers=200, hours=0.5, warmup_hours=0.1, seed=77)).run()
    assert found.throughput_of_best >= 0.9
    assert found.even_of_best >= 0.6
    assert found.moves_per_peer_hour < 0.2
    assert found.uncovered_seconds == 0


def test_a_hole_is_filled_and_the_swarm_recovers_by_moving(simulation: ModuleType) -> None:
    world = simulation.World(num_peers=60, hours=0.5, warmup_hours=0.1, seed=78, joining_per_hour=0, hole=Span(20, 24))
    found = simulation.Swarm(world).run()
    assert 0 < found.uncovered_seconds < 180
    assert 0 < found.recovery_seconds < 900
    assert found.gap_moves >= 1
    assert found.balance_moves >= 1
    nobody = dataclasses.replace(world, rules=MovingRules(stand_seconds=1e6))
    assert simulation.Swarm(nobody).run().throughput_of_best < found.throughput_of_best


def test_the_same_seed_gives_the_same_swarm(simulation: ModuleType) -> None:
    world = simulation.World(num_peers=8, hours=0.1, warmup_hours=0, seed=5, leaving_per_hour=9, joining_per_hour=9)
    found = simulation.Swarm(world).run()
    assert simulation.Swarm(world).run() == found
    assert simulation.Swarm(dataclasses.replace(world, seed=6)).run() != found
