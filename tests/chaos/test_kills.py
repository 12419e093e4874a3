"""A host is killed with kill -9: training and generation go on, and the survivors stay equal to the bit."""

from __future__ import annotations

import logging
import signal
import time
from pathlib import Path

import pytest
from parts.chaos_hosts import is_running
from parts.chaos_swarm import BATCH, SETTLE_SECONDS, ChaosSwarm, Story
from parts.faults import FaultKind, FaultPlan
from parts.tiny_model import BACK, FRONT, WHOLE, counting_rows

from peers.network import PeerId
from swarm.model import Sampling
from tests.chaos.watched_pool import unwatch, watch
from tests.integration.swarm.small_swarm import until

logger = logging.getLogger(__name__)

PROMPT = "w3 w4 w5 w6"


def test_a_text_goes_on_unchanged_whichever_of_its_hosts_is_killed(swarm: ChaosSwarm) -> None:
    swarm.ensure()
    swarm.rest()  # each text is of the round in which it begins
    client = swarm.enter("client")
    sampling = Sampling(max_new_tokens=24)
    expected = client.model().generate(PROMPT, sampling)[0]
    assert expected
    died: set[str] = set()

    def kill(peer: PeerId) -> None:
        died.add(swarm.name_of(peer))
        swarm.kill(swarm.name_of(peer))

    for kind in ("step", "collect"):  # the client sends to the front half and hears from the back half
        watched = watch(client, kind, 5, before=kill, sent=lambda peer: None)
        try:
            model = client.model()
        finally:
            unwatch(client)
        began = time.monotonic()
        assert model.generate(PROMPT, sampling)[0] == expected
        logger.info("killed in a text: all of it took %.2f s", time.monotonic() - began)
        assert watched.struck is not None
    assert {swarm.hosts[name].host.span == FRONT for name in died} == {True, False}


def test_a_host_killed_in_the_middle_of_training_neither_stops_nor_corrupts_it(swarm: ChaosSwarm) -> None:
    swarm.ensure(back=1)
    trainer = swarm.enter("trainer")
    swarm.rest()
    before = swarm.counted(0), swarm.counted(BACK.start)
    doomed = [name for name in swarm.alive if swarm.hosts[name].host.span == FRONT]
    plan = FaultPlan(seed=7).add_one_of(FaultKind.KILL, doomed, at=5)
    family = swarm.family(plan.faults[0].name)
    story = swarm.train(trainer, 16, plan, data=counting_rows(64, by=3))  # which no other test has taught this swarm
    assert story.falls, story.losses
    number = swarm.newest_round
    swarm.train_to_round(trainer, number + 1, story)
    logger.info("killed in training: stall %s s, usual step %.2f s", story.stalls(), story.usual_step)
    assert swarm.wait_equal() > number
    # The half that lost nobody has counted every sample once; the other at most once.
    trained = len(story.losses) * BATCH
    until(lambda: swarm.counted(BACK.start) - before[1] == trained, f"{trained} samples counted, each once")
    until(lambda: swarm.counted(0) - before[0] <= trained, f"at most {trained} samples counted")
    until(lambda: not any(map(is_running, family)), "the end of the killed host and its p2pd", seconds=20)


@pytest.mark.parametrize("parts", [1, pytest.param(0, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_a_host_killed_in_the_all_reduce_leaves_the_others_equal_and_catches_up(swarm: ChaosSwarm, parts: int) -> None:
    swarm.ensure(front=1)
    trainer = swarm.enter("trainer")
    name = f"whole-{parts}"  # it holds every block, so that all the others lose a partner
    script = Path(__file__).with_name("dying_host.py")
    dying = swarm.start(name, WHOLE, program=(str(script), str(parts)))
    swarm.wait_ready(name)
    number = swarm.newest_round
    story = Story()
    deadline = time.monotonic() + SETTLE_SECONDS
    while dying.process.poll() is None:
        assert time.monotonic() < deadline, "it was to die in its first all-reduce"
        swarm.train(trainer, 2, story=story)
    dying.kill()
    assert dying.process.returncode == -signal.SIGKILL
    died_at = time.monotonic()
    swarm.train(trainer, 1, story=story)
    logger.info("killed in the all-reduce: next step after %.2f s", time.monotonic() - died_at)
    swarm.train_to_round(trainer, number + 2, story)
    logger.info("killed in the all-reduce: next round after %.2f s", time.monotonic() - died_at)
    stood = swarm.wait_equal()
    swarm.start(name, WHOLE)
    swarm.wait_ready(name)
    assert swarm.wait_equal() >= stood
    swarm.train_to_round(trainer, stood + 1, story)
    assert swarm.wait_equal() > stood
    assert all(name in holders for holders in swarm.digests().values())


def test_a_host_killed_in_a_backward_pass_costs_only_that_pass(swarm: ChaosSwarm) -> None:
    swarm.ensure(front=1)
    trainer = swarm.enter("trainer")
    swarm.rest()
    before = swarm.counted(0), swarm.counted(BACK.start)

    def freeze(peer: PeerId) -> None:  # so that it cannot have answered when it dies
        swarm.freeze(swarm.name_of(peer))

    def kill(peer: PeerId) -> None:
        swarm.kill(swarm.name_of(peer))

    # Backward passes begin at the end of the chain: the first one goes to a holder of the back half.
    watched = watch(trainer, "backward", 1, before=freeze, sent=kill)
    try:
        began = time.monotonic()
        story = swarm.train(trainer, 8)
    finally:
        unwatch(trainer)
    logger.info("killed in a backward: first step %.2f s, usual %.2f", story.steps_at[0] - began, story.usual_step)
    assert watched.struck is not None
    died = swarm.hosts[swarm.name_of(watched.struck)].host.span
    assert died.covers(BACK)
    assert story.repeated >= 1
    number = swarm.newest_round
    swarm.train_to_round(trainer, number + 1, story)
    assert swarm.wait_equal() > number
    trained = len(story.losses) * BATCH
    if died == BACK:  # who held nothing else took no front work with it
        until(lambda: swarm.counted(0) - before[0] == trained, f"{trained} samples counted, each once")
    # The records of a round that was just applied may be told a moment later; what counted twice would stay.
    until(lambda: swarm.counted(BACK.start) - before[1] <= trained, f"at most {trained} samples counted")
