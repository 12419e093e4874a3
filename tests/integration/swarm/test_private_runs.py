"""A private group over real transports, from the first invitation to the last: invite, train, generate, revoke."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from peers.errors import BadMembership, NetworkFailed
from peers.private.gate import Gate
from peers.private.membership import Role
from swarm.errors import NotInvited
from swarm.join_string import resolve_join
from swarm.peer import Peer
from swarm.private.inviting import revoke
from swarm.private.revoking import REVOKED_NAME
from swarm.training.trainer import Progress
from tests.integration.swarm.conftest import MakeSwarm
from tests.integration.swarm.machines import Machine
from tests.integration.swarm.small_swarm import (
    BACK,
    FRONT,
    NO_ROUNDS,
    WHOLE,
    host_of,
    random_samples,
    until,
)

PRIVATE = {"security": {"private": True}, "rounds": {"round_samples": 8}}


def test_a_private_group_works_together_until_its_owner_puts_somebody_out(
    make_swarm: MakeSwarm, tmp_path: Path
) -> None:
    swarm = make_swarm(PRIVATE)
    own = swarm.host("own", FRONT)
    bobs, cems = Machine(tmp_path / "bob", swarm), Machine(tmp_path / "cem", swarm)
    line = bobs.invited(Role.HOST)
    bob = bobs.enter("bob", line)
    assert bob.id == bobs.id
    swarm.hold(bob, BACK)
    trainer = bobs.enter("trainer", line, client_mode=True)  # a second peer of the machine that was invited
    assert trainer.id != bobs.id
    trainer.train(random_samples(16), steps=4)
    until(lambda: min(host_of(peer).round for peer in (own, bob)) >= 1, "a round of both")
    client = cems.enter("client", cems.invited(Role.CLIENT), client_mode=True)
    assert client.status().hosts
    assert isinstance(client.model().generate("a b", adapter=True)[0], str)
    assert client.export(tmp_path / "adapter") >= 1
    with pytest.raises(NotInvited, match="invited as a client"):
        client.train(random_samples(4), steps=1)
    # Somebody who only has the join string, and somebody with bob's line on another machine.
    with pytest.raises(NetworkFailed, match="is not let into this private run: it has no membership"):
        Peer.enter(own.join, replace(swarm.config("eve"), state=None, state_root=tmp_path / "eve"))
    with pytest.raises(NotInvited, match=f"is for peer {bobs.id}, this machine is peer {cems.id}"):
        cems.enter("thief", line)

    number, _ = revoke(resolve_join(str(swarm.run)), bobs.id)
    until(lambda: gate_number(own) == number, "the owner's host has the list")
    with pytest.raises(BadMembership, match="was revoked by the run's owner"):  # and bob learns why
        bob.watch(lambda line: None, seconds=0.5)
    with pytest.raises(BadMembership, match="was revoked by the run's owner"):
        trainer.watch(lambda line: None, seconds=0.5)
    until(lambda: gate_number(client) == number, "the client has it")
    swarm.stop("bob", "trainer")
    assert list(bobs.root.glob(f"*/peer-0/{REVOKED_NAME}"))
    with pytest.raises((BadMembership, NetworkFailed), match="was revoked by the run's owner"):
        bobs.enter("bob", line)
    again = bobs.enter("bob", bobs.invited(Role.HOST))
    assert own.id in {host.peer for host in again.status().hosts}


def test_who_is_put_out_in_the_middle_of_its_work_is_told_soon_and_goes_on_with_a_new_invitation(
    make_swarm: MakeSwarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = make_swarm({**PRIVATE, "rounds": {"round_samples": NO_ROUNDS}})
    own = swarm.host("own", WHOLE)
    bobs, cems = Machine(tmp_path / "bob", swarm), Machine(tmp_path / "cem", swarm)
    trainer = bobs.enter("trainer", bobs.invited(Role.TRAINER), client_mode=True)
    client = cems.enter("client", cems.invited(Role.CLIENT), client_mode=True)
    with ThreadPoolExecutor(2) as pool:
        steps: list[Progress] = []
        training = pool.submit(trainer.train, random_samples(64), steps=10**6, on_progress=steps.append)
        writing = pool.submit(write_on, client)
        until(lambda: bool(steps), "the first step")
        revoke(resolve_join(str(swarm.run)), bobs.id)
        with pytest.raises(BadMembership, match=f"{bobs.id} was revoked by the run's owner; only a new invitation"):
            training.result(timeout=180)  # a route is waited for longer, which would be in vain
        assert not writing.done()
        later = time.time() + 2 * 86400 - time.monotonic()
        for gate in (gate_of(own), gate_of(client)):
            monkeypatch.setattr(gate, "_clock", lambda: later + time.monotonic())
        with pytest.raises(BadMembership, match=r"its membership expired .* ago; ask the run's owner for"):
            writing.result(timeout=180)
    swarm.stop("trainer", "client")
    again = bobs.enter("trainer", bobs.invited(Role.TRAINER, days=9), client_mode=True)
    assert len(again.train(random_samples(4), steps=1).losses) == 1


def write_on(peer: Peer) -> None:
    model = peer.model()
    while True:
        model.generate("a b", adapter=True)


def gate_of(peer: Peer) -> Gate:
    gate = peer.node.network.gate
    assert gate is not None
    return gate


def gate_number(peer: Peer) -> int:
    return gate_of(peer).revoked.number
