"""A trainer brings what is missing to the run's total and no more, and is gone from the records when it ends."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

from swarm.peer import Peer
from tests.integration.swarm.conftest import MakeSwarm
from tests.integration.swarm.small_swarm import WHOLE, random_samples, until

BATCH, TOTAL = 4, 18
SETTINGS = {"training": {"batch_size": BATCH, "total_samples": TOTAL}, "rounds": {"round_samples": 2 * BATCH}}


def told(peer: Peer) -> list[int]:
    """Samples of the run, as every host's record says that a peer reads now."""
    return [each.total_samples for each in peer.status().progress.values()]


def test_what_others_brought_and_rounds_have_averaged_is_not_missing(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(SETTINGS)
    host = swarm.host("host", WHOLE)
    first, second = swarm.enter("first"), swarm.enter("second")
    assert len(first.train(random_samples(8), steps=3, last_round=1).losses) == 3
    until(lambda: told(second) == [3 * BATCH], "what is there is told")
    result = second.train(random_samples(8, seed=6), held_out=random_samples(4, seed=7))
    assert len(result.losses) == math.ceil((TOTAL - 3 * BATCH) / BATCH)
    assert host.status().trainers == (), "both have ended, and their records would live for a minute"
    until(lambda: told(first) == [TOTAL + 2], "all is told: whole batches, of which the last goes over the total")
    nothing = first.train(random_samples(8), held_out=random_samples(4, seed=7))
    assert nothing.losses == ()
    assert len(nothing.evaluations) >= 1, "what there is can be measured all the same"
    assert len(first.train(random_samples(8), steps=1).losses) == 1, "more can be asked for"


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
