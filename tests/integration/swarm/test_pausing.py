"""A host that is paused or told to go steps back without harm to those who work through it, and comes back."""

from __future__ import annotations

import itertools
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from threading import Event

import pytest

from peers.routes.routing import RouteRules
from swarm.hosts.pause_file import is_hosting, say_pause, say_resume
from swarm.peer import Peer
from swarm.training.trainer import Progress
from tests.integration.swarm.conftest import MakeSwarm
from tests.integration.swarm.small_swarm import BACK, WHOLE, host_of, random_samples, until

BATCH, ROUND_SAMPLES = 4, 16
SETTINGS = {
    "training": {"batch_size": BATCH, "learning_rate": 1e-2},
    "rounds": {"round_samples": ROUND_SAMPLES},
}


def steps(peer: Peer) -> int:
    return host_of(peer).trainer.steps


def samples_since(peer: Peer) -> set[int]:
    """What has been counted since the last round, of any unit."""
    return {counted.samples for counted in host_of(peer).counted().values()}


def agree(*hosts: Peer) -> bool:
    found: dict[int, set[bytes]] = {}
    for host in hosts:
        for block, digest in host_of(host).digests().items():
            found.setdefault(block, set()).add(digest)
    return all(len(bits) == 1 for bits in found.values())


def is_away(peer: Peer) -> bool:
    assert peer.node.hosting is not None
    return peer.node.hosting.keeper.is_away


@dataclass
class Work:
    """A trainer at work in a thread of its own, until it is told to stop."""

    trainer: Peer
    step_ends: list[float] = field(default_factory=list)
    stop: Event = field(default_factory=Event)

    def run(self) -> int:
        """Returns how many microbatches had to go again."""
        repeated = 0
        while not self.stop.is_set():
            result = self.trainer.train(random_samples(64), steps=8, on_progress=self._note)
            repeated += result.repeated
        return repeated

    def slowest(self) -> float:
        """Seconds of the slowest step."""
        return max(after - before for before, after in itertools.pairwise(self.step_ends))

    def _note(self, progress: Progress) -> None:
        self.step_ends.append(time.monotonic())


def test_training_goes_on_without_a_paused_host_which_then_catches_up(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(SETTINGS)
    ann, bob = swarm.hosts(ann=WHOLE, bob=WHOLE)
    trainer = swarm.enter("trainer")
    trainer.train(random_samples(32), steps=4)
    until(lambda: min(host_of(ann).round, host_of(bob).round) >= 1, "the first round, of both")
    assert agree(ann, bob)
    through_bob = replace(swarm.config("other"), rules=RouteRules(allow=frozenset({bob.id})))
    other = swarm.enter("other", through_bob)
    other.train(random_samples(8, seed=8), steps=2)  # half of a round, which only bob has
    until(lambda: samples_since(bob) == {2 * BATCH}, "bob has counted them")

    state = swarm.run / "states" / "bob"
    assert is_hosting(state)
    say_pause(state)
    until(lambda: is_away(bob), "bob is paused")
    assert "paused by hand" in bob.node.line()
    until(lambda: [record.peer for record in trainer.node.router.records] == [ann.id], "nobody routes through bob")
    status = trainer.status()
    assert [(host.peer, host.away) for host in status.paused] == [(bob.id, "hand")]
    assert status.missing == ()

    began, stood, round_before = steps(ann), steps(bob), host_of(bob).round
    trainer.train(random_samples(32, seed=6), steps=4)
    until(lambda: host_of(ann).round >= round_before + 1, "a round without bob")
    assert steps(ann) >= began + 4
    assert (steps(bob), host_of(bob).round) == (stood, round_before), "a paused host took part"

    say_resume(state)
    until(lambda: not is_away(bob), "bob is back")
    assert host_of(bob).round == host_of(ann).round, "it was back before it had caught up"
    assert agree(ann, bob)
    assert samples_since(bob) == {2 * BATCH}, "what it had trained before the pause is lost"
    assert "paused" not in bob.node.line()
    until(lambda: len(trainer.node.router.records) == 2, "bob is seen again")
    number = host_of(ann).round
    trainer.train(random_samples(32, seed=7), steps=8)
    until(lambda: min(host_of(ann).round, host_of(bob).round) >= number + 1, "a round of both")
    until(lambda: host_of(ann).round == host_of(bob).round and agree(ann, bob), "equal units")
    in_rounds = {state.total_samples for host in (ann, bob) for state in host_of(host).units.values()}
    since = samples_since(ann).pop() + samples_since(bob).pop()
    assert in_rounds == {(4 + 2 + 4 + 8) * BATCH - since}, "every sample is in a round, or will be in the next"
    stood = steps(bob)
    other.train(random_samples(8, seed=8), steps=1)
    until(lambda: steps(bob) > stood, "bob takes work again")


def test_a_host_that_is_told_to_go_costs_its_trainer_no_microbatch_and_no_wait(
    make_swarm: MakeSwarm, caplog: pytest.LogCaptureFixture
) -> None:
    swarm = make_swarm()
    swarm.hosts(ann=WHOLE, bob=WHOLE, cem=BACK)
    trainer = swarm.enter("trainer")
    work = Work(trainer)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work.run)
        try:
            until(lambda: len(work.step_ends) >= 5 and steps(swarm.peers["bob"]) > 0, "steps through bob")
            caplog.set_level(logging.WARNING)
            swarm.stop("bob")
            stood = len(work.step_ends)
            until(lambda: len(work.step_ends) >= stood + 5, "steps without bob")
        finally:
            work.stop.set()
        assert done.result(timeout=60) == 0, "a microbatch had to go again"
    assert not [record for record in caplog.records if "hop failed" in record.getMessage()]
    assert work.slowest() < 10, "a step waited for a host that had gone"
