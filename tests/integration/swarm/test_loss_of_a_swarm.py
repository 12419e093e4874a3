"""Training through the swarm is the same training as in one process."""

from __future__ import annotations

from pathlib import Path

from blocks.adapters import read_units
from blocks.load import load_tokenizer
from blocks.spans import Span, parse_unit
from swarm.data.demo_text import pydoc_samples
from swarm.peer import Peer
from tests.integration.swarm.conftest import MakeSwarm
from tests.integration.swarm.reference_run import ReferenceRun, greatest_difference, run_reference
from tests.integration.swarm.small_swarm import BACK, FRONT, WHOLE, host_of, random_samples, until

TOLERANCE = 1e-4
LEARNT = 0.5  # nats by which the loss falls in these runs; far above the tolerance, or equality would mean little


def greatest_tensor_difference(peers: list[Peer], reference: ReferenceRun) -> float:
    differences = []
    for peer in peers:
        for unit, tensors in read_units(host_of(peer).model).items():
            for name, tensor in tensors.items():
                differences.append(float((tensor - reference.tensors[parse_unit(unit)[1], name]).abs().max()))
    assert len(differences) == len(reference.tensors)
    return max(differences)


def wait_for_steps(peers: list[Peer], steps: int) -> None:
    """A commit is answered before the host's optimizer step, which follows at once."""
    until(lambda: all(host_of(peer).trainer.steps == steps for peer in peers), f"{steps} steps")


def test_the_loss_through_two_hosts_equals_a_single_process(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm()
    data = random_samples(8)
    hosts = swarm.hosts(front=FRONT, back=BACK)
    found = swarm.enter("trainer").train(data, steps=20)
    wait_for_steps(hosts, 20)
    reference = run_reference(swarm.source, hosts[0].node.spec, data, steps=20)
    assert greatest_difference(found.losses, reference.losses) < TOLERANCE
    assert reference.losses[0] - reference.losses[-1] > LEARNT
    assert greatest_tensor_difference(hosts, reference) < TOLERANCE
    assert found.repeated == 0


def test_clipping_per_unit_equals_a_single_process_in_several_microbatches(make_swarm: MakeSwarm) -> None:
    training = {"batch_size": 8, "learning_rate": 1e-2, "clip_norm": 0.05, "weight_decay": 0.1}
    swarm = make_swarm({"training": training})
    data = random_samples(16, shortest=100, longest=500)  # more than TOKEN_BUDGET tokens a batch
    hosts = swarm.hosts(front=FRONT, back=BACK)
    found = swarm.enter("trainer").train(data, steps=4)
    wait_for_steps(hosts, 4)
    spec = hosts[0].node.spec
    reference = run_reference(swarm.source, spec, data, steps=4)
    assert greatest_difference(found.losses, reference.losses) < TOLERANCE
    assert greatest_tensor_difference(hosts, reference) < TOLERANCE


def test_a_peer_that_holds_every_block_trains_alone_as_a_single_process(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm()
    data = random_samples(8)
    alone = swarm.host("alone", WHOLE)
    found = alone.train(data, steps=10)
    wait_for_steps([alone], 10)
    reference = run_reference(swarm.source, alone.node.spec, data, steps=10)
    assert greatest_difference(found.losses, reference.losses) < TOLERANCE
    assert greatest_tensor_difference([alone], reference) < TOLERANCE
    assert reference.losses[0] - reference.losses[-1] > LEARNT / 2


def test_the_loss_on_smollm2_equals_a_single_process(make_swarm: MakeSwarm, smollm2: Path) -> None:
    swarm = make_swarm({"training": {"batch_size": 1, "learning_rate": 2e-3, "clip_norm": 0.0}}, model=str(smollm2))
    data = pydoc_samples(load_tokenizer(swarm.source), 16)[0].head(4)
    hosts = swarm.hosts(front=Span(0, 15), back=Span(15, 30))
    found = swarm.enter("trainer").train(data, steps=20)
    wait_for_steps(hosts, 20)
    reference = run_reference(swarm.source, hosts[0].node.spec, data, steps=20)
    assert greatest_difference(found.losses, reference.losses) < TOLERANCE
    assert reference.losses[0] - reference.losses[-1] > LEARNT


def test_a_trainer_that_is_started_again_goes_on_where_its_data_stood(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm()
    data = random_samples(24)
    hosts = swarm.hosts(front=FRONT, back=BACK)
    first = swarm.enter("trainer").train(data, steps=4)
    swarm.stop("trainer")
    second = swarm.enter("trainer").train(data, steps=4)
    wait_for_steps(hosts, 8)
    reference = run_reference(swarm.source, hosts[0].node.spec, data, steps=8)
    assert greatest_difference([*first.losses, *second.losses], reference.losses) < TOLERANCE
    assert (swarm.run / "states" / "trainer" / "trainer.json").is_file()
