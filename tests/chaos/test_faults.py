"""Each kind of fault, for seconds at one host: training goes on, and after the next round all holders are equal."""

from __future__ import annotations

import logging

import pytest
from parts.chaos_swarm import ChaosSwarm
from parts.faults import ALL_KINDS, FaultKind, FaultPlan

logger = logging.getLogger(__name__)

STEPS, SECONDS = 10, 2.0
LONG_STEPS, LONG_SECONDS = 100, 30.0
WHOLE_AFTERWARDS = frozenset(ALL_KINDS) - {FaultKind.KILL, FaultKind.RESTART}


def go_through(swarm: ChaosSwarm, kind: FaultKind, steps: int, seconds: float) -> None:
    """One fault of the first holder of the front half; kills end with its start."""
    swarm.ensure()
    trainer = swarm.enter("trainer")
    before = swarm.newest_round
    process = swarm.hosts["a"].process
    story = swarm.train(trainer, steps, FaultPlan(seed=1).add(kind, "a", at=2, seconds=seconds))
    swarm.settled()
    logger.info("%s: stall %.2f s, usual step %.2f s", kind, *story.stalls(), story.usual_step)
    assert len(story.losses) == steps
    assert (swarm.hosts["a"].process is process) == (kind in WHOLE_AFTERWARDS), swarm.hosts["a"].tail()
    assert swarm.is_alive("a"), swarm.hosts["a"].tail()
    swarm.train_to_round(trainer, swarm.newest_round + 1, story)
    assert swarm.wait_equal() > before
    assert len(set(swarm.digests()[0])) >= 2, "its host holds its blocks again"


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_training_goes_on_through_a_fault_and_all_are_equal_after_it(swarm: ChaosSwarm, kind: FaultKind) -> None:
    go_through(swarm, kind, STEPS, SECONDS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_training_goes_on_through_a_long_fault(swarm: ChaosSwarm, kind: FaultKind) -> None:
    go_through(swarm, kind, LONG_STEPS, LONG_SECONDS)


def test_a_full_disk_costs_checkpoints_and_nothing_that_was_there(swarm: ChaosSwarm) -> None:
    swarm.ensure()
    trainer = swarm.enter("trainer")
    swarm.train_to_round(trainer, swarm.newest_round + 1)
    directory = swarm.hosts["a"].host.state / "checkpoints"
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert before
    plan = FaultPlan(seed=1).add(FaultKind.DISK, "a", at=1)
    number = swarm.newest_round
    swarm.train(trainer, 2, plan)
    swarm.train_to_round(trainer, number + 1)
    assert swarm.is_alive("a"), swarm.hosts["a"].tail()
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    swarm.undo(plan.faults[0])
    number = swarm.newest_round
    swarm.train_to_round(trainer, number + 1)
    assert {path.name for path in directory.iterdir()} - set(before), "it writes checkpoints again"
    assert swarm.wait_equal() > number
