"""Peers that nobody can dial hold blocks for themselves: they train through these, average, generate, and catch up."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from peers.config import NetworkConfig
from peers.errors import NoRoute
from swarm.errors import BadConfig
from swarm.peer import Peer
from tests.integration.swarm.conftest import MakeSwarm
from tests.integration.swarm.small_swarm import BACK, FRONT, SmallSwarm, host_of, random_samples, until

SETTINGS = {"training": {"batch_size": 4, "learning_rate": 1e-2}, "rounds": {"round_samples": 16}}


def enter_behind_nat(swarm: SmallSwarm, name: str, route_seconds: float = 60.0) -> Peer:
    config = swarm.config(name, route_seconds=route_seconds)
    return swarm.enter(name, replace(config, network=NetworkConfig(host="127.0.0.1", client_mode=True)))


def agree(ann: Peer, bob: Peer, number: int) -> bool:
    """Whether both stand at a round from `number` on, with the same bits, and no unit was left out of it."""
    hosts = host_of(ann), host_of(bob)
    rounds = {state.round for host in hosts for state in host.units.values()}
    return len(rounds) == 1 and min(rounds) >= number and hosts[0].digests() == hosts[1].digests()


def train_a_round(swarm: SmallSwarm, public: Peer, ann: Peer, bob: Peer) -> None:
    """Two peers behind NAT take the front and train through it at once, until they have averaged with its help."""
    for peer in (ann, bob):
        swarm.hold(peer, FRONT)
    until(lambda: known(public) == {ann.id, bob.id}, "the public host knows both")
    with ThreadPoolExecutor(2) as pool:
        training = [
            pool.submit(peer.train, random_samples(32, seed=seed), steps=8) for seed, peer in enumerate((ann, bob))
        ]
        until(lambda: has_helped(public), "the public host has reduced what both have trained")
        for done in training:
            done.result()
    until(lambda: agree(ann, bob, 1), "a round of both")


def test_two_peers_behind_nat_train_average_and_generate_and_a_third_catches_up(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(SETTINGS)
    public = swarm.host("public", BACK)
    ann, bob = (enter_behind_nat(swarm, name) for name in ("ann", "bob"))
    with pytest.raises(BadConfig, match="say by --blocks"):
        swarm.hold(ann, None)
    train_a_round(swarm, public, ann, bob)
    assert not {ann.id, bob.id} & {*ann.node.traffic.by_peer, *bob.node.traffic.by_peer}, "each used its own blocks"
    # What is left of their samples may fill one more round, which one of them has a moment before the other.
    until(lambda: len({peer.generate("a b", max_new_tokens=4) for peer in (ann, bob)}) == 1, "both write the same")
    # Others cannot use these blocks, and are not sent there.
    client = enter_behind_nat(swarm, "client", route_seconds=1.0)
    with pytest.raises(NoRoute, match="0:3"):
        client.generate("a b", max_new_tokens=4)
    # Neither of the two can be asked for its units by a third behind NAT, who gets them from their keeper.
    until(lambda: len(host_of(public).kept.units) == len(FRONT), "the public host keeps their units")
    late = enter_behind_nat(swarm, "late")
    swarm.hold(late, FRONT)
    until(lambda: agree(ann, late, 1), "the newcomer has what both have learnt")


def known(peer: Peer) -> set[str]:
    assert peer.node.hosting is not None
    return {record.peer for record in peer.node.hosting.keeper.company.others()}


def has_helped(peer: Peer) -> bool:
    assert peer.node.hosting is not None
    last = peer.node.hosting.keeper.last
    return last is not None and last.helped > 0
