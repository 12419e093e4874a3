"""Peers of a private run that nobody can dial: with a host's invitation they average, blocks and loops of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

import swarm as api
from peers.private.membership import Role
from swarm.errors import NotInvited
from tests.integration.swarm.conftest import MakeSwarm
from tests.integration.swarm.machines import Machine
from tests.integration.swarm.small_swarm import BACK, FRONT, host_of, until
from tests.integration.swarm.test_behind_nat import train_a_round
from tests.integration.swarm.test_own_loops import SETTINGS, Loop, live_equals_state

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft about transformers

PRIVATE = {**SETTINGS, "security": {"private": True}}


def test_blocks_held_behind_nat_are_averaged_by_members_who_were_invited_as_hosts(
    make_swarm: MakeSwarm, tmp_path: Path
) -> None:
    swarm = make_swarm(PRIVATE)
    public = swarm.host("public", BACK)
    machines = [Machine(tmp_path / name, swarm) for name in ("ann", "bob")]
    ann, bob = (each.enter(each.root.name, each.invited(Role.HOST), client_mode=True) for each in machines)
    train_a_round(swarm, public, ann, bob)
    cem = Machine(tmp_path / "cem", swarm)
    trainer = cem.enter("cem", cem.invited(Role.TRAINER), client_mode=True)
    with pytest.raises(NotInvited, match=r"invited as a trainer, and only hosts hold blocks .* with --role host"):
        swarm.hold(trainer, FRONT)


def test_a_loop_of_ones_own_behind_nat_takes_part_if_it_was_invited_as_a_host(
    make_swarm: MakeSwarm, tmp_path: Path
) -> None:
    swarm = make_swarm(PRIVATE)
    public = swarm.host("public", FRONT)
    machine = Machine(tmp_path / "ann", swarm)
    loop = Loop(swarm, "ann")

    def config(role: Role) -> tuple[object, object]:
        return machine.target(machine.invited(role)), machine.config(client_mode=True)

    target, settings = config(Role.TRAINER)
    with pytest.raises(NotInvited, match="invited as a trainer, and only hosts hold blocks or average"):
        api.member(loop.model, loop.optimizer, target, config=settings)
    target, settings = config(Role.HOST)
    with api.member(loop.model, loop.optimizer, target, config=settings) as member:
        for _ in range(4):
            loop.step(member)
        assert member.wait_for_round(1, seconds=60)
        until(lambda: host_of(public).round >= 1, "the host's round")
        ours, theirs = member._part.units.digests(), host_of(public).digests()
        assert {unit: ours[unit] for unit in theirs} == theirs
        assert live_equals_state(member)
