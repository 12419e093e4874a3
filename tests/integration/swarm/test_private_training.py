"""A peer that holds every block keeps its activations to itself, though others hold blocks too; adapters are shared."""

from __future__ import annotations

from dataclasses import replace

from blocks.spans import Span
from peers.routes.routing import RouteRules
from tests.integration.swarm.conftest import MakeSwarm
from tests.integration.swarm.small_swarm import BACK, FRONT, WHOLE, block_samples, host_of, random_samples, until


def test_who_holds_every_block_trains_and_generates_through_itself_alone(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm({"rounds": {"round_samples": 8}})
    other, own = swarm.hosts(other=WHOLE, own=WHOLE)
    until(lambda: len(own.node.router.records) == 2, "both hosts are known to each other")
    own.train(random_samples(8), steps=4)
    assert own.holds_all
    assert set(block_samples(other).values()) == {0}
    own.model().generate("a b", adapter=True)
    asked = {kind for kind, count in own.node.traffic.by_peer.get(other.id, {}).items() if count.sent}
    assert not asked & {"forward", "backward", "step", "evaluate"}
    # What it learnt reaches the other all the same.
    until(lambda: host_of(other).round >= 1 and host_of(own).round >= 1, "a round of both")
    until(lambda: host_of(other).digests() == host_of(own).digests(), "equal adapters")
    assert any(state.round > 0 for state in host_of(other).units.values())


def test_nothing_of_the_first_blocks_leaves_a_trainer_that_keeps_them(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm()
    front, back = swarm.hosts(front=FRONT, back=BACK)
    rules = RouteRules(keep_first=2, allow=frozenset({front.id, back.id}))
    own = swarm.enter("own", replace(swarm.config("own"), rules=rules))
    swarm.hold(own, Span(0, 2))
    until(lambda: len(own.node.router.records) == 3, "all hosts are known")
    samples = random_samples(8)
    own.train(samples, steps=2, held_out=samples)
    own.model().generate("a b", adapter=True)
    assert block_samples(own) == {0: 8, 1: 8}
    assert block_samples(front) == {0: 0, 1: 0, 2: 8}
    assert block_samples(back) == {3: 8, 4: 8, 5: 8}
