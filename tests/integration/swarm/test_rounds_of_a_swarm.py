"""After a round everybody who holds a block has the same bits of it, whenever they came, left or came back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from blocks.adapters import read_units
from swarm.hosts.host import Host
from swarm.peer import Peer
from tests.integration.swarm.conftest import MakeSwarm
from tests.integration.swarm.small_swarm import BACK, FRONT, WHOLE, SmallSwarm, host_of, random_samples, until

BATCH, ROUND_SAMPLES = 4, 16
SETTINGS = {
    "training": {"batch_size": BATCH, "learning_rate": 1e-2},
    "rounds": {"round_samples": ROUND_SAMPLES},
}
STEPS_A_ROUND = ROUND_SAMPLES // BATCH


def train_one_round(swarm: SmallSwarm, trainer: Peer, hosts: Sequence[Peer]) -> int:
    """Exactly the samples of one round, then wait until all hosts have applied it."""
    wanted = max(host_of(host).round for host in hosts) + 1
    trainer.train(random_samples(32), steps=STEPS_A_ROUND)
    until(lambda: all(host_of(host).shelf.newest.round >= wanted for host in hosts), f"round {wanted}")
    return wanted


def digests(*hosts: Peer) -> dict[int, set[bytes]]:
    """Which bits are served, per block; one entry each where all holders agree."""
    found: dict[int, set[bytes]] = {}
    for host in hosts:
        for block, digest in host_of(host).digests().items():
            found.setdefault(block, set()).add(digest)
    return found


def agree(*hosts: Peer) -> bool:
    return all(len(bits) == 1 for bits in digests(*hosts).values())


def moments_of(peer: Peer) -> dict[str, dict[str, torch.Tensor]]:
    host = host_of(peer)
    return {str(unit): host.trainer.unit_steps.read_moments()[unit] for unit in host.units}


def served_equals_trained(host: Host) -> bool:
    """No step has been made since the round, so what is served is what is trained."""
    live = read_units(host.model)
    served = read_units(host.model, host.shelf.newest.label)
    return all(torch.equal(live[unit][name], served[unit][name]) for unit in live for name in live[unit])


def two_rounds(swarm: SmallSwarm, hosts: Sequence[Peer]) -> Iterator[int]:
    """Train through two rounds, and say when each is over: all holders agree, and both changed every block."""
    trainer = swarm.enter("trainer")
    seen = [digests(*hosts)]
    for number in (1, 2):
        assert train_one_round(swarm, trainer, hosts) == number
        assert agree(*hosts)
        seen.append(digests(*hosts))
        yield number
    for block in WHOLE.blocks():
        assert len({bits for digest in seen for bits in digest[block]}) == 3, "a round changed nothing"


def test_after_each_round_all_holders_have_equal_bits_and_serve_them(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(SETTINGS)
    hosts = swarm.hosts(a=FRONT, b=BACK, c=WHOLE)
    for number in two_rounds(swarm, hosts):
        for host in hosts:
            assert host_of(host).shelf.newest.round == number
            assert served_equals_trained(host_of(host))
            assert all(state.total_samples == number * ROUND_SAMPLES for state in host_of(host).units.values())


def test_a_newcomer_has_the_adapters_and_the_moments_of_the_current_round(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(SETTINGS)
    hosts = swarm.hosts(a=FRONT, b=BACK)
    trainer = swarm.enter("trainer")
    number = train_one_round(swarm, trainer, hosts)
    newcomer = swarm.host("newcomer", WHOLE)
    assert host_of(newcomer).round == number
    assert agree(newcomer, *hosts)
    assert served_equals_trained(host_of(newcomer))
    theirs = {unit: tensors for host in hosts for unit, tensors in moments_of(host).items()}
    for unit, tensors in moments_of(newcomer).items():
        assert tensors.keys() == theirs[unit].keys()
        assert tensors, "a newcomer has no moments"
        assert all(torch.equal(tensors[name], theirs[unit][name]) for name in tensors)


def test_a_peer_that_is_started_again_goes_on_as_itself_and_catches_up(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(SETTINGS)
    hosts = swarm.hosts(a=FRONT, b=BACK, c=FRONT)
    trainer = swarm.enter("trainer")
    number = train_one_round(swarm, trainer, hosts)
    peer, before = swarm.peers["c"].id, digests(swarm.peers["c"])
    swarm.stop("c")
    again = swarm.host("c", FRONT)
    assert again.id == peer
    assert host_of(again).round == number
    assert digests(again) == before
    swarm.stop("c")
    number = train_one_round(swarm, trainer, hosts[:2])
    again = swarm.host("c", FRONT)
    assert host_of(again).round == number
    assert agree(again, *hosts[:2])


def test_a_whole_swarm_goes_on_from_its_directories(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(SETTINGS)
    hosts = swarm.hosts(a=FRONT, b=BACK, c=WHOLE)
    number = train_one_round(swarm, swarm.enter("trainer"), hosts)
    before, identities = digests(*hosts), [host.id for host in hosts]
    moments = [moments_of(host) for host in hosts]
    swarm.close()
    again = swarm.hosts(a=FRONT, b=BACK, c=WHOLE)
    assert [host.id for host in again] == identities
    assert [host_of(host).round for host in again] == [number] * 3
    assert digests(*again) == before
    for old, host in zip(moments, again, strict=True):
        new = moments_of(host)
        assert all(torch.equal(new[unit][name], old[unit][name]) for unit in old for name in old[unit])
    assert train_one_round(swarm, swarm.enter("trainer"), again) == number + 1
    assert agree(*again)


def test_a_peer_that_holds_every_block_makes_its_rounds_alone(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(SETTINGS)
    alone = swarm.host("alone", WHOLE)
    train_one_round(swarm, alone, [alone])
    assert served_equals_trained(host_of(alone))


def test_the_held_out_loss_falls_round_by_round(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(SETTINGS)
    hosts = swarm.hosts(a=FRONT, b=BACK, c=WHOLE)
    trainer = swarm.enter("trainer")
    data = random_samples(8)  # learnt by heart: random tokens follow no other rule
    losses = []
    for number in (1, 2):
        losses.append(trainer.train(data, steps=STEPS_A_ROUND, held_out=data).evaluations[0])
        until(
            lambda wanted=number: all(host_of(host).shelf.newest.round >= wanted for host in hosts), f"round {number}"
        )  # type: ignore[misc]
        assert trainer.wait_for_round(number, seconds=120)
    losses.append(trainer.train(data, steps=1, held_out=data).evaluations[0])
    assert [evaluation.round for evaluation in losses] == [0, 1, 2]
    assert losses[0].loss > losses[1].loss + 0.05 > losses[2].loss + 0.1
