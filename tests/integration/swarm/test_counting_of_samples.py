"""Every sample is counted once for every block, whoever sends it and whoever dies."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from blocks.ledger import MicrobatchId
from swarm.peer import Peer
from tests.integration.swarm.conftest import MakeSwarm
from tests.integration.swarm.small_swarm import BACK, FRONT, NUM_BLOCKS, block_samples, host_of, kill, random_samples

BATCH = 4
SETTINGS = {"training": {"batch_size": BATCH, "learning_rate": 1e-3}}


def counted(*peers: Peer) -> dict[int, int]:
    """Samples committed per block, by all of `peers` together."""
    total: dict[int, int] = {}
    for peer in peers:
        for block, samples in block_samples(peer).items():
            total[block] = total.get(block, 0) + samples
    return total


class DiesInCommit:
    """Counts a trainer's commits at one host, and takes the host off the network after the `last` one was counted.

    The trainer cannot know whether a commit without an answer was counted: the hardest moment to die at.
    """

    def __init__(self, peer: Peer, last: int) -> None:
        self.samples_before = 0
        self.died = threading.Event()
        self._peer, self._left = peer, last
        self._commit: Callable[[MicrobatchId], Awaitable[None]] = host_of(peer).trainer.commit

    async def __call__(self, microbatch: MicrobatchId) -> None:
        self._left -= 1
        if self._left == 0:
            self.samples_before = next(iter(block_samples(self._peer).values()))
            await self._commit(microbatch)
            kill(self._peer)
            self.died.set()
        elif not self.died.is_set():
            await self._commit(microbatch)


def test_two_trainers_lose_no_sample_and_count_none_twice(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(SETTINGS)
    hosts = swarm.hosts(a=FRONT, b=BACK, c=FRONT, d=BACK)
    trainers = [swarm.enter("first"), swarm.enter("second")]
    steps = 12
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(trainer.train, random_samples(16, seed=seed), steps=steps)
            for seed, trainer in enumerate(trainers)
        ]
        results = [job.result() for job in jobs]
    assert counted(*hosts) == dict.fromkeys(range(NUM_BLOCKS), 2 * steps * BATCH)
    assert [len(result.losses) for result in results] == [steps, steps]
    assert all(min(block_samples(host).values()) > 0 for host in hosts), "a replica saw nothing"


@pytest.mark.parametrize("victim", ["a", "b"])
def test_a_host_that_dies_in_a_commit_makes_nobody_count_twice(
    make_swarm: MakeSwarm, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    swarm = make_swarm(SETTINGS)
    hosts = dict(zip("abcd", swarm.hosts(a=FRONT, b=BACK, c=FRONT, d=BACK), strict=True))
    trainer = swarm.enter("trainer")
    dying = hosts[victim]
    death = DiesInCommit(dying, last=3)
    monkeypatch.setattr(host_of(dying).trainer, "commit", death)
    steps = 16
    result = trainer.train(random_samples(16), steps=steps)
    assert death.died.is_set(), "the victim got fewer than three microbatches"
    sent = steps * BATCH
    living = counted(*(host for host in hosts.values() if host is not dying))
    lost_span = host_of(dying).span
    for block in range(NUM_BLOCKS):
        # What the dead host had answered for is gone with it until the next round; the rest was done again, once.
        assert living[block] == (sent - death.samples_before if block in lost_span else sent)
    assert result.repeated >= 1
