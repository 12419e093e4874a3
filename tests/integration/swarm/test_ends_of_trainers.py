"""A trainer is gone from the records when it ends."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from tests.integration.swarm.conftest import MakeSwarm
from tests.integration.swarm.small_swarm import WHOLE, random_samples, until

BATCH, TOTAL = 4, 18
SETTINGS = {"training": {"batch_size": BATCH, "total_samples": TOTAL}, "rounds": {"round_samples": 2 * BATCH}}


def test_a_trainer_whose_peer_closes_in_the_middle_says_goodbye(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(SETTINGS)
    host = swarm.host("host", WHOLE)
    trainer = swarm.enter("trainer")
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(trainer.train, random_samples(8), steps=100_000)
        until(lambda: [each.peer for each in host.status().trainers] == [trainer.id], "the trainer is in the status")
        swarm.stop("trainer")
        assert training.exception(timeout=60) is not None
    assert host.status().trainers == ()
