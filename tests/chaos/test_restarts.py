"""Processes that come back: the whole swarm, a trainer, a host that slept."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import pytest
from parts.chaos_hosts import START_SECONDS
from parts.chaos_swarm import BATCH, ChaosSwarm, Story
from parts.faults import FaultKind, FaultPlan
from parts.tiny_model import save_counting_rows

from swarm.join_string import format_join
from swarm.training.trainer import STATE_NAME

logger = logging.getLogger(__name__)

DRAIN_SECONDS = 20.0  # how long a host's step waits for microbatches of somebody who is silent


def test_the_whole_swarm_is_killed_and_goes_on_from_its_state_directories(swarm: ChaosSwarm) -> None:
    swarm.ensure(front=1, back=1)
    swarm.train_to_round(swarm.enter("trainer"), swarm.newest_round + 1)
    stood = swarm.rest()
    before = {block: set(found.values()) for block, found in swarm.digests().items()}
    for name in list(swarm.peers):
        swarm.leave(name)
    for name in swarm.alive:
        swarm.kill(name)
    assert swarm.join is None  # nobody is left: the next one starts from the run directory alone
    swarm.ensure()
    assert swarm.wait_equal() == stood
    assert {block: set(found.values()) for block, found in swarm.digests().items()} == before
    trainer = swarm.enter("trainer")
    story = swarm.train(trainer, 8)
    swarm.train_to_round(trainer, stood + 2, story)
    assert swarm.wait_equal() >= stood + 2
    assert story.losses[-1] < 5.0


@pytest.mark.parametrize(("kind", "number"), [("backward", 6), pytest.param("commit", 5, marks=pytest.mark.slow)])
def test_a_killed_trainer_goes_on_where_its_data_stood_and_holds_nobody_up(
    swarm: ChaosSwarm, kind: str, number: int
) -> None:
    swarm.ensure(front=1, back=1)
    state = swarm.root / "states" / f"killed-{kind}"
    data = save_counting_rows(swarm.root / "rows.jsonl", 64)
    other = swarm.enter("trainer")
    assert swarm.join is not None
    arguments = ("train", format_join(swarm.join), "--data", str(data), "--state", str(state), "--threads", "1")
    script = Path(__file__).with_name("dying_trainer.py")
    dead = swarm.command(*arguments, "--steps", "50", program=(str(script), kind, str(number)))
    assert dead.wait(timeout=START_SECONDS) == -9
    died_at = time.monotonic()
    saved = json.loads((state / STATE_NAME).read_text())
    assert saved["step"] >= 1
    steps = [record.total_samples for record in swarm.records().values()]
    story = swarm.train(other, 4)
    took = time.monotonic() - died_at
    logger.info("trainer killed in %s: 4 steps of another took %.1f s", kind, took)
    assert took < DRAIN_SECONDS, "its open microbatches held up the others"
    again = swarm.command(*arguments, "--steps", "3")
    assert again.wait(timeout=START_SECONDS) == 0
    after = json.loads((state / STATE_NAME).read_text())
    assert after["step"] == saved["step"] + 3
    assert after["samples"] == saved["samples"] + 3 * BATCH
    number_now = swarm.newest_round
    swarm.train_to_round(other, number_now + 1, story)
    assert swarm.wait_equal() > number_now
    assert sum(record.total_samples for record in swarm.records().values()) > sum(steps)


def test_a_host_that_sleeps_is_passed_by_and_catches_up(swarm: ChaosSwarm) -> None:
    swarm.ensure()
    impatient = swarm.enter("impatient", call_seconds=3.0)
    plan = FaultPlan(seed=3).add(FaultKind.STOP, "b", at=2)
    story = Story()
    try:
        swarm.train(impatient, 8, plan, story)
        logger.info("frozen: stall %s s", story.stalls())
        number = max(record.round for name, record in swarm.records().items() if name != "b")
        deadline = time.monotonic() + 60
        while min(r.round for name, r in swarm.records().items() if name != "b") <= number:
            assert time.monotonic() < deadline, "the others average without the one that sleeps"
            swarm.train(impatient, 2, story=story)
    finally:
        swarm.thaw("b")
    swarm.train_to_round(impatient, number + 2, story)
    assert swarm.wait_equal() >= number + 2
    assert "b" in swarm.digests()[0]
