"""The gate asks a peer once, remembers the answer for a bounded time, and lets nobody pass who is no member."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from peers.errors import BadMembership, NetworkFailed, NotAdmitted
from peers.network import PeerId
from peers.private.gate import Gate, Shown, role_of_caller
from peers.private.membership import Role
from peers.private.revocation import Revocations, sign_revocations
from tests.errors_page import met
from tests.private_runs import Owner

RUN = "tales"
OWNER = Owner(run=RUN)
ME, ANN, BOB = (PeerId("Qm" + letter * 44) for letter in "mab")
T0 = 1_000_000
HOUR = 3600


@dataclass
class World:
    """Who answers what, at which time."""

    now: float = T0
    shown: dict[PeerId, bytes] = field(default_factory=dict)
    revoked: bytes = b""
    asked: list[PeerId] = field(default_factory=list)
    wait: asyncio.Event | None = None

    async def ask(self, peer: PeerId) -> Shown:
        self.asked.append(peer)
        if self.wait is not None:
            await self.wait.wait()
        if peer not in self.shown:
            raise NetworkFailed("nobody answers")
        return Shown(self.shown[peer], self.revoked)

    def sign(self, peer: PeerId, role: Role = Role.HOST, *, seconds: int = HOUR, at: int = T0) -> bytes:
        return OWNER.sign(peer, role, not_before=at, expires_at=at + seconds)

    def gate(self, revoked: Revocations | None = None) -> Gate:
        members = OWNER.members(self.sign(ME, seconds=100 * HOUR), revoked or Revocations(run=RUN))
        return Gate(members, run=RUN, me=ME, ask=self.ask, clock=lambda: self.now)


@pytest.fixture
def world() -> World:
    return World()


class FakeWriter:
    """What the gate needs of a stream."""

    def __init__(self) -> None:
        self.is_aborted = False
        self.transport = self

    def abort(self) -> None:
        self.is_aborted = True


PROTOCOLS: Mapping[str, Role] = {
    "DHTProtocol.rpc_ping": Role.CLIENT,
    "DHTProtocol.rpc_find": Role.CLIENT,
    "DHTProtocol.rpc_store": Role.TRAINER,
    f"{RUN}::AveragingServicer.rpc_join_group": Role.HOST,
    f"{RUN}::AveragingServicer.rpc_aggregate_part": Role.HOST,
    f"{RUN}::AveragingServicer.rpc_vote": Role.HOST,
    f"swarmtune/{RUN}/info": Role.CLIENT,
    f"swarmtune/{RUN}/decode": Role.CLIENT,
    f"swarmtune/{RUN}/units": Role.CLIENT,
    f"swarmtune/{RUN}/train": Role.TRAINER,
    f"swarmtune/{RUN}/what comes later": Role.HOST,
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("role", list(Role))
async def test_each_role_may_call_what_it_should_and_nothing_else(world: World, role: Role, protocol: str) -> None:
    gate = world.gate()
    world.shown[ANN] = world.sign(ANN, role)
    assert role_of_caller(protocol) is PROTOCOLS[protocol]
    if role.covers(PROTOCOLS[protocol]):
        await gate.let_in(ANN, protocol)
    else:
        with pytest.raises(NotAdmitted, match=f"was invited as {role}, this needs {PROTOCOLS[protocol]}") as refusal:
            await gate.let_in(ANN, protocol)
        assert not refusal.value.passing


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("role", list(Role))
async def test_only_hosts_are_called_and_anybody_for_info(world: World, role: Role, protocol: str) -> None:
    gate = world.gate()
    world.shown[ANN] = world.sign(ANN, role)
    if role is Role.HOST or protocol.endswith("/info"):
        await gate.let_out(ANN, protocol)
    else:
        with pytest.raises(NotAdmitted, match="may not serve"):
            await gate.let_out(ANN, protocol)


async def test_a_member_is_asked_once_even_by_many_at_once(world: World) -> None:
    gate, world.wait = world.gate(), asyncio.Event()
    world.shown[ANN] = world.sign(ANN)
    waiting = [asyncio.create_task(gate.let_in(ANN, "info")) for _ in range(20)]
    await asyncio.sleep(0)
    waiting[0].cancel()  # who gives up takes nothing from the others
    world.wait.set()
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert [one for one in found[1:] if one is not None] == []
    await gate.let_out(ANN, "train")
    assert world.asked == [ANN]


async def test_a_membership_counts_until_it_expires_and_the_next_one_is_asked_for(world: World) -> None:
    gate = world.gate()
    world.shown[ANN] = world.sign(ANN)
    await gate.let_in(ANN, "info")
    world.now = T0 + HOUR + 4
    await gate.let_in(ANN, "info")
    world.now = T0 + HOUR + 6
    with pytest.raises(NotAdmitted, match="expired 6 s ago"):
        await gate.let_in(ANN, "info")
    assert gate.role(ANN) is None
    world.shown[ANN] = world.sign(ANN, at=T0 + HOUR)
    world.now += 11
    await gate.let_in(ANN, "info")
    assert gate.role(ANN) is Role.HOST


async def test_a_stranger_is_asked_again_after_ever_longer_waits_and_never_more_often(world: World) -> None:
    gate = world.gate()
    for _ in range(600):
        with pytest.raises(NotAdmitted, match=r"cannot be asked for its membership \(nobody answers\)") as refusal:
            await gate.let_in(BOB, "info")
        assert refusal.value.passing
        world.now += 0.1
    assert 5 <= len(world.asked) <= 12
    world.shown[BOB] = world.sign(BOB)
    world.now += 11
    await gate.let_in(BOB, "info")


async def test_what_is_shown_must_be_a_membership_of_just_this_peer(world: World) -> None:
    gate = world.gate()
    for blob, reason in (
        (world.sign(ANN), "each peer needs its own"),
        (Owner(run=RUN).sign(BOB), "not signed by this run's owner"),
        (Owner(run="other", key=OWNER.key).sign(BOB), "of run other"),
        (b"rubbish", "malformed"),
    ):
        world.shown[BOB] = blob
        world.now += 20
        with pytest.raises(NotAdmitted, match=reason) as refusal:
            await gate.let_in(BOB, "info")
        assert repr(refusal.value).startswith("not admitted: peer ")
        assert not gate.may_publish(BOB, "peer")


async def test_no_number_of_strangers_pushes_out_a_member(world: World) -> None:
    gate = world.gate()
    world.shown[ANN] = world.sign(ANN)
    await gate.let_in(ANN, "info")
    for number in range(5000):
        with pytest.raises(NotAdmitted):
            await gate.let_in(PeerId(f"Qm{number:044}"), "info")
    assert gate.role(ANN) is Role.HOST
    assert len(gate._strangers) <= 4096
    await gate.let_in(ANN, "info")
    assert world.asked.count(ANN) == 1


async def test_only_so_many_are_asked_at_once_and_members_pass_meanwhile(world: World) -> None:
    gate = world.gate()
    world.shown[ANN] = world.sign(ANN)
    await gate.let_in(ANN, "info")
    world.wait = asyncio.Event()
    waiting = [asyncio.create_task(gate.let_in(PeerId(f"Qm{number:044}"), "info")) for number in range(64)]
    await until_asked(world, 65)
    with pytest.raises(NotAdmitted, match="too many") as refusal:
        await gate.let_in(BOB, "info")
    assert refusal.value.passing
    await gate.let_in(ANN, "info")
    await gate.close()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_who_is_revoked_is_out_at_once_with_its_streams_and_others_stay(world: World) -> None:
    gate = world.gate()
    streams = {peer: FakeWriter() for peer in (ANN, BOB)}
    for peer in (ANN, BOB):
        world.shown[peer] = world.sign(peer)
        await gate.let_in(peer, "decode")
        gate.track(peer, streams[peer])  # type: ignore[arg-type]
    assert gate.revoke(Revocations(run=RUN).with_peer(ANN, T0 + 1))
    assert [streams[peer].is_aborted for peer in (ANN, BOB)] == [True, False]
    world.now += 60
    with pytest.raises(NotAdmitted, match="was revoked by the run's owner") as caught:
        await gate.let_in(ANN, "info")
    met("is not let into this private run", caught.value)
    with pytest.raises(NotAdmitted, match="was revoked by the run's owner"):
        await gate.let_out(ANN, "info")
    assert not gate.may_publish(ANN, "peer")
    await gate.let_in(BOB, "info")


async def test_streams_of_one_whose_time_is_over_end_at_the_next_sweep(world: World) -> None:
    gate, stream = world.gate(), FakeWriter()
    world.shown[ANN] = world.sign(ANN)
    await gate.let_in(ANN, "decode")
    gate.track(ANN, stream)  # type: ignore[arg-type]
    gate.sweep()
    assert not stream.is_aborted
    world.now += HOUR + 6
    gate.sweep()
    assert stream.is_aborted


async def test_an_older_list_is_not_taken(world: World) -> None:
    newer = Revocations(run=RUN).with_peer(ANN, T0).with_peer(BOB, T0)
    gate = world.gate(newer)
    assert not gate.revoke(Revocations(run=RUN).with_peer(ANN, T0))
    assert not gate.revoke(Revocations(run=RUN, number=2))
    assert gate.revoked == newer


async def test_a_revoked_peer_that_is_invited_again_comes_in_again(world: World) -> None:
    gate = world.gate(Revocations(run=RUN).with_peer(ANN, T0))
    world.shown[ANN] = world.sign(ANN)
    with pytest.raises(NotAdmitted, match="revoked"):
        await gate.let_in(ANN, "info")
    world.shown[ANN] = world.sign(ANN, at=T0 + 1)
    world.now += 11
    await gate.let_in(ANN, "info")
    assert gate.may_publish(ANN, "peer")


async def test_a_member_with_a_new_role_may_more_after_a_moment(world: World) -> None:
    gate = world.gate()
    world.shown[ANN] = world.sign(ANN, Role.CLIENT)
    with pytest.raises(NotAdmitted):
        await gate.let_in(ANN, "train")
    world.shown[ANN] = world.sign(ANN, Role.TRAINER)
    with pytest.raises(NotAdmitted):
        await gate.let_in(ANN, "train")
    world.now += 6
    await gate.let_in(ANN, "train")
    assert world.asked == [ANN, ANN]


async def test_who_publishes_more_than_it_may_is_asked_for_a_new_role(world: World) -> None:
    gate = world.gate()
    world.shown[ANN] = world.sign(ANN, Role.TRAINER)
    await gate.let_in(ANN, "info")
    world.shown[ANN] = world.sign(ANN, Role.HOST)
    assert not gate.may_publish(ANN, "progress")
    await until_asked(world, 1)  # too soon
    world.now += 6
    for _ in range(3):
        assert not gate.may_publish(ANN, "progress"), "one who is asked may no more than before"
    await until_asked(world, 2)
    assert gate.may_publish(ANN, "progress")


async def test_a_member_that_cannot_be_asked_for_more_stays_what_it_is(world: World) -> None:
    gate = world.gate()
    world.shown[ANN] = world.sign(ANN, Role.CLIENT)
    await gate.let_in(ANN, "info")
    del world.shown[ANN]
    world.now += 6
    with pytest.raises(NotAdmitted, match="was invited as client"):
        await gate.let_in(ANN, "train")
    await gate.let_in(ANN, "info")


@pytest.mark.parametrize(
    ("role", "kinds"),
    [
        (Role.CLIENT, set()),
        (Role.TRAINER, {"trainer", "evaluation", "run", "revoked"}),
        (Role.HOST, {"trainer", "evaluation", "run", "revoked", "peer", "progress"}),
    ],
)
async def test_what_a_member_may_publish_is_by_its_role(world: World, role: Role, kinds: set[str]) -> None:
    gate = world.gate()
    everything = ("trainer", "evaluation", "run", "revoked", "peer", "progress", "something new")
    assert all(gate.may_publish(ANN, kind) for kind in everything)  # nothing is known of it yet
    world.shown[ANN] = world.sign(ANN, role)
    await gate.let_in(ANN, "info")
    allowed = {kind for kind in everything if gate.may_publish(ANN, kind)}
    assert allowed - {"something new"} == kinds
    assert ("something new" in allowed) == (role is Role.HOST)


async def test_a_peer_that_is_refused_learns_from_the_owners_own_word_why(world: World) -> None:
    gate = world.gate()
    gate.check_own()
    world.shown[ANN] = world.sign(ANN)
    world.revoked = b"what a liar says"
    gate.refused_by(ANN)
    await until_asked(world, 1)
    gate.check_own()
    world.revoked = sign_revocations(Revocations(run=RUN).with_peer(ME, T0), OWNER.key)
    gate.refused_by(ANN)  # too soon
    world.now += 6
    gate.refused_by(ANN)
    await until_asked(world, 2)
    assert gate.shown.revoked == world.revoked
    with pytest.raises(BadMembership, match=r"\(Qmm+\) .* was revoked by the run's owner") as caught:
        gate.check_own()
    met("is not let into the private run", caught.value)


async def until_asked(world: World, times: int) -> None:
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(world.asked) == times


async def test_no_peer_starts_without_a_membership_of_its_own(world: World) -> None:
    for blob in (world.sign(ANN), world.sign(ME, seconds=1, at=T0 - 60), b""):
        with pytest.raises(BadMembership):
            Gate(OWNER.members(blob), run=RUN, me=ME, ask=world.ask, clock=lambda: world.now)
    revoked = Revocations(run=RUN).with_peer(ME, T0)
    with pytest.raises(BadMembership, match="revoked"):
        world.gate(revoked)


async def test_calls_to_oneself_are_never_asked_about(world: World) -> None:
    gate = world.gate()
    await gate.let_in(ME, "train")
    await gate.let_out(ME, "train")
    assert gate.may_publish(ME, "peer")
    assert world.asked == []
