"""Every sample is counted once for every block, whoever sends it and whoever dies."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from blocks.training.ledger import MicrobatchId, Piece
from peers.routes import routing
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


class Books:
    """What one host's ledger counted: samples by block and microbatch, written down beside it."""

    def __init__(self, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.samples: dict[int, dict[MicrobatchId, int]] = {block: {} for block in range(NUM_BLOCKS)}
        self._ledger = host_of(peer).trainer.ledger
        self._commit: Callable[[Piece], frozenset[int]] = self._ledger.commit
        monkeypatch.setattr(self._ledger, "commit", self)

    def __call__(self, piece: Piece) -> frozenset[int]:
        before = {block: tally.total_samples for block, tally in self._ledger.tallies.items()}
        fresh = self._commit(piece)
        for block in fresh:
            samples = self._ledger.tallies[block].total_samples - before[block]
            assert self.samples[block].setdefault(piece.microbatch, samples) == samples
        return fresh


class DiesInCommit:
    """Takes a host off the network when it has counted its `last` commit and not answered it.

    The trainer cannot know whether a commit without an answer was counted: the hardest moment to die at.
    """

    def __init__(self, peer: Peer, monkeypatch: pytest.MonkeyPatch, *, last: int) -> None:
        self.unanswered: Piece | None = None
        self._peer, self._left = peer, last
        self._commit: Callable[[Piece], Awaitable[None]] = host_of(peer).trainer.commit
        monkeypatch.setattr(host_of(peer).trainer, "commit", self)

    async def __call__(self, piece: Piece) -> None:
        await self._commit(piece)
        self._left -= 1
        if self._left == 0:
            self.unanswered = piece
            kill(self._peer)


def test_two_trainers_lose_no_sample_and_count_none_twice(
    make_swarm: MakeSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "_ALIKE", 1e9)  # else a replica that looked slow at first might get nothing
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
    # Else the victim, if it looked slow at first, would get too little to die of.
    monkeypatch.setattr(routing, "_ALIKE", 1e9)
    swarm = make_swarm(SETTINGS)
    hosts = dict(zip("abcd", swarm.hosts(a=FRONT, b=BACK, c=FRONT, d=BACK), strict=True))
    trainer = swarm.enter("trainer")
    dying = hosts[victim]
    books = {name: Books(host, monkeypatch) for name, host in hosts.items()}
    death = DiesInCommit(dying, monkeypatch, last=3)
    steps = 16
    result = trainer.train(random_samples(16), steps=steps)
    assert result.repeated >= 1
    assert death.unanswered is not None, "the victim got fewer than three microbatches"
    dead = books.pop(victim).samples
    for block in range(NUM_BLOCKS):
        living = [book.samples[block] for book in books.values()]
        ids = [microbatch for samples in living for microbatch in samples]
        assert len(ids) == len(set(ids)), "living hosts counted a microbatch twice"
        everything = {**dead[block]} | {id_: number for samples in living for id_, number in samples.items()}
        assert sum(everything.values()) == steps * BATCH, "samples were lost"
        if block in death.unanswered.span:
            # Counted by the dead one, who could not say so, and therefore by a living one as well.
            assert death.unanswered.microbatch in dead[block]
            assert death.unanswered.microbatch in ids
