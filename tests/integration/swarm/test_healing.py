"""A swarm that lost the last holder of some blocks gets one from among its own, with what had been learnt."""

from __future__ import annotations

import threading

from blocks.spans import Span
from swarm.hosts.loading import HostingConfig
from swarm.join_string import RunDirectory
from swarm.peer import Peer
from tests.integration.swarm.conftest import MakeSwarm
from tests.integration.swarm.small_swarm import (
    BACK,
    CACHE_BYTES,
    FRONT,
    NUM_BLOCKS,
    SmallSwarm,
    host_of,
    random_samples,
    until,
)
from tests.integration.swarm.test_keepers import assert_equal, states_of, wait_until_kept

HALF = NUM_BLOCKS // 2
SETTINGS = {"training": {"batch_size": 4, "learning_rate": 1e-2}, "rounds": {"round_samples": 16}}


def volunteer(swarm: SmallSwarm, name: str, span: Span | None = None) -> Peer:
    """A host that holds half of the blocks: which, it chooses itself unless `span` says so."""
    peer = swarm.enter(name)
    config = HostingConfig(cache_dir=swarm.cache_dir, num_threads=1, cache_bytes=CACHE_BYTES, max_blocks=HALF)
    peer.hold(span, config)
    return peer


def looks_for_a_place(peer: Peer) -> bool:
    return "placement" in {task.get_name() for task in peer.node._tasks}


def held(peer: Peer) -> Span | None:
    return None if peer.node.hosting is None else peer.node.hosting.host.span


def test_the_last_holder_of_blocks_is_replaced_by_one_that_moves_and_training_goes_on(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(SETTINGS)
    ann, bob, cat = (volunteer(swarm, name) for name in ("ann", "bob", "cat"))
    spans = [held(peer) for peer in (ann, bob, cat)]
    assert sorted(span for span in spans if span) != [FRONT] * 3
    lonely = next(name for name, span in zip(("ann", "bob", "cat"), spans, strict=True) if spans.count(span) == 1)
    others = [peer for name, peer in (("ann", ann), ("bob", bob), ("cat", cat)) if name != lonely]
    gone = held(swarm.peers[lonely])
    trainer = swarm.enter("trainer")
    trainer.train(random_samples(32), steps=4)
    until(lambda: all(host_of(peer).round == 1 for peer in (ann, bob, cat)), "round 1")
    wait_until_kept(others[0], swarm.peers[lonely])
    wait_until_kept(others[1], swarm.peers[lonely])
    before = states_of(swarm.peers[lonely])
    swarm.kill(lonely)
    until(lambda: gone in [held(peer) for peer in others], "somebody holds the blocks again")
    assert {held(peer) for peer in others} == {FRONT, BACK}  # one moved, and one stayed
    (moved,) = (peer for peer in others if held(peer) == gone)
    for unit, state in states_of(moved).items():
        assert_equal(state, before[unit])
    result = trainer.train(random_samples(32, seed=6), steps=4)
    assert len(result.losses) == 4
    until(lambda: all(host_of(peer).round >= 2 for peer in others), "round 2")


def test_a_host_whose_blocks_were_chosen_by_hand_looks_for_no_others(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(SETTINGS)
    ann, bob = volunteer(swarm, "ann", FRONT), volunteer(swarm, "bob")
    assert held(bob) == BACK
    assert [looks_for_a_place(peer) for peer in (ann, bob)] == [False, True]


def test_training_goes_on_while_a_host_moves_to_blocks_that_need_it_more(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(SETTINGS)
    ann, bob = swarm.hosts(ann=FRONT, bob=BACK)
    cat = volunteer(swarm, "cat")
    start = held(cat)
    other = BACK if start == FRONT else FRONT
    trainer = swarm.enter("trainer")
    losses: list[float] = []
    work = threading.Thread(target=lambda: losses.extend(trainer.train(random_samples(128), steps=16).losses))
    work.start()
    holding = cat.node._holding
    assert holding is not None
    assert cat.loop.run(holding.move(other))
    work.join(120)
    assert held(cat) == other
    assert len(losses) == 16
    until(
        lambda: len({peer.node.hosting.host.round for peer in (ann, bob, cat) if peer.node.hosting}) == 1, "one round"
    )
    twin = ann if other == FRONT else bob
    until(lambda: host_of(cat).digests() == host_of(twin).digests(), "replicas are equal")


def test_blocks_that_cannot_be_loaded_leave_the_host_where_it_was(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(SETTINGS)
    peer = Peer.enter(RunDirectory(path=swarm.run, join=None), swarm.config("ann"))
    swarm.peers["ann"] = peer
    peer.hold(None, HostingConfig(cache_dir=swarm.cache_dir, num_threads=1, cache_bytes=CACHE_BYTES, max_blocks=HALF))
    before = held(peer)
    holding = peer.node._holding
    assert holding is not None
    assert not peer.loop.run(holding.move(Span(NUM_BLOCKS - 1, NUM_BLOCKS + 3)))
    assert held(peer) == before
    assert not holding.announcer.away
    assert holding.announcer.place.moves_to is None
