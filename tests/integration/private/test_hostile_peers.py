"""Peers that do not belong to a private run, over real transports: refused at every protocol, while members go on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hivemind.p2p import PeerID

from blocks.spans import Span
from peers.errors import NOT_ADMITTED, NetworkFailed
from peers.hivemind_network import HivemindNetwork
from peers.identity import Identity, load_or_create
from peers.network import PeerId
from peers.private.membership import Role, let_in_by_bearer, let_in_by_member, sign_grant
from peers.private.revocation import Revocations
from tests.fakes import RUN, peer_record
from tests.integration.private.conftest import Start
from tests.integration.private.hostile import (
    AVERAGING,
    EVERYTHING,
    KINDS,
    PASSED,
    Mask,
    Watched,
    forget_strangers,
    got_value,
    try_everything,
)
from tests.private_runs import Owner

PeerOf = Callable[[str], PeerId]
WHOLE = Span(0, 16)


async def watched(node: HivemindNetwork) -> Watched:
    made = Watched(node)
    await made.serve()
    return made


def nothing(owner: Owner, eve: Identity, bob: PeerId) -> bytes | None:
    return None


def expired(owner: Owner, eve: Identity, bob: PeerId) -> bytes:
    now = int(time.time())
    return owner.sign(eve.peer, not_before=now - 100, expires_at=now - 10)


def of_another_run(owner: Owner, eve: Identity, bob: PeerId) -> bytes:
    return Owner(run="f" * 32, key=owner.key).sign(eve.peer)


def by_another_owner(owner: Owner, eve: Identity, bob: PeerId) -> bytes:
    return Owner(run=RUN).sign(eve.peer)


def replayed(owner: Owner, eve: Identity, bob: PeerId) -> bytes:
    return owner.sign(bob)


def stolen(owner: Owner, eve: Identity, bob: PeerId) -> bytes:
    """The line was for bob's identity; eve has it, but not bob's key."""
    return let_in_by_member(owner.sign(bob), eve, eve.peer)


def of_a_bearer_whose_key_she_lacks(owner: Owner, eve: Identity, bob: PeerId) -> bytes:
    grant = owner.grant(None, bearer=Ed25519PrivateKey.generate().public_key().public_bytes_raw())
    return let_in_by_bearer(sign_grant(grant, owner.key), Ed25519PrivateKey.generate(), eve.peer)


def rubbish(owner: Owner, eve: Identity, bob: PeerId) -> bytes:
    return b"\x93" * 600


HOSTILE = (
    nothing,
    expired,
    of_another_run,
    by_another_owner,
    replayed,
    stolen,
    of_a_bearer_whose_key_she_lacks,
    rubbish,
)


async def test_a_peer_that_is_no_member_is_refused_everywhere_and_told_nothing(
    start: Start, owner: Owner, peer_of: PeerOf, tmp_path: Path
) -> None:
    ann, eve = await asyncio.gather(start("ann"), start("eve", members=None))
    at_ann, at_eve = await watched(ann), await watched(eve)
    identity = load_or_create(tmp_path / "eve.id")
    await eve.connect(ann.peer_id, await ann.addresses())
    mask = Mask(eve)
    for case in HOSTILE:
        await mask.show(case(owner, identity, peer_of("bob")))
        forget_strangers(ann)
        outcomes = await try_everything(eve, ann)
        assert set(outcomes) == EVERYTHING
        wrong = {name: why for name, why in outcomes.items() if not why.startswith(NOT_ADMITTED)}
        assert (case.__name__, wrong, at_ann.told, got_value(ann)) == (case.__name__, {}, [], False)
        # Nor does a member tell her anything, whatever she serves.
        forget_strangers(ann)
        passed = {name for name, why in (await try_everything(ann, eve)).items() if why == PASSED}
        assert (case.__name__, passed, at_eve.told, got_value(eve)) == (case.__name__, set(), [], False)
    assert ann.dht_node.protocol.routing_table.get(peer_id=PeerID.from_base58(eve.peer_id)) is None
    # The same two, once she shows what she should: so it was for nothing else that she was refused.
    await mask.show(owner.sign(eve.peer_id))
    forget_strangers(ann)
    assert set((await try_everything(eve, ann)).values()) == {PASSED}
    assert got_value(ann)


@pytest.mark.parametrize(
    ("role", "refused"),
    [(Role.CLIENT, {"store", "train", *AVERAGING}), (Role.TRAINER, set(AVERAGING)), (Role.HOST, set())],
)
async def test_a_member_passes_as_far_as_its_role_goes(start: Start, role: Role, refused: set[str]) -> None:
    ann = await start("ann")
    at_ann = await watched(ann)
    member = await start("member", ann, role=role, client_mode=True)
    outcomes = await try_everything(member, ann)
    assert {name for name, why in outcomes.items() if why != PASSED} == refused
    assert {kind for kind, _ in at_ann.told} == set(KINDS) - refused
    assert got_value(ann) == ("store" not in refused)
    # A member that is no host is told nothing, though it serves whatever a host does.
    if role is not Role.HOST:
        at_member = await watched(member)
        outcomes = await try_everything(ann, member)
        assert {name for name in (*KINDS, *AVERAGING) if outcomes[name] == PASSED} == {"info"}
        assert {kind for kind, _ in at_member.told} == {"info"}


async def test_who_is_revoked_while_connected_loses_its_streams_and_everything_else(start: Start, owner: Owner) -> None:
    ann = await start("ann")
    at_ann = await watched(ann)
    bob, cem = await start("bob", ann), await start("cem", ann)
    streams = {kind: await bob.open_stream(ann.peer_id, kind) for kind in KINDS}
    honest = await cem.open_stream(ann.peer_id, "train")
    assert set((await try_everything(bob, ann)).values()) == {PASSED}
    assert ann.gate is not None
    ann.gate.revoke(Revocations(run=RUN).with_peer(bob.peer_id, int(time.time())))
    async with asyncio.timeout(20):
        for stream in streams.values():
            assert await stream.reader.read() == b""
    at_ann.told.clear()
    outcomes = await try_everything(bob, ann)
    assert {name for name, why in outcomes.items() if "was revoked by the run's owner" not in why} == set()
    assert at_ann.told == []
    with pytest.raises(NetworkFailed, match="was revoked by the run's owner"):
        await ann.open_stream(bob.peer_id, "train")
    assert set((await try_everything(cem, ann)).values()) == {PASSED}
    assert not honest.reader.at_eof()
    for stream in (*streams.values(), honest):
        stream.writer.close()


async def test_a_membership_that_runs_out_while_connected_ends_its_streams(
    start: Start, owner: Owner, peer_of: PeerOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = await start("ann")
    at_ann = await watched(ann)
    now = int(time.time())
    blob = owner.sign(peer_of("bob"), not_before=now - 60, expires_at=now + 1800)  # ann's own is for an hour
    bob = await start("bob", ann, members=owner.members(blob))
    stream = await bob.open_stream(ann.peer_id, "decode")
    async with asyncio.timeout(40):
        await at_ann.met.wait()
        monkeypatch.setattr(ann.gate, "_clock", lambda: time.time() + 1900)
        assert await stream.reader.read() == b""
    outcomes = await try_everything(bob, ann)
    assert {name for name, why in outcomes.items() if "its membership expired" not in why} == set()
    stream.writer.close()


async def test_a_stranger_that_joins_by_the_plain_line_is_told_what_to_do_at_once(start: Start) -> None:
    ann = await start("ann")
    began = time.monotonic()
    with pytest.raises(NetworkFailed, match=r"says: peer Qm\w+ is not let into this private run: it has no membership"):
        await start("eve", ann, members=None)
    assert time.monotonic() - began < 20  # long before its 20 s of trying, beside the rest of a start, would be over


async def test_members_find_each_other_and_records_of_others_are_not_believed(
    start: Start, owner: Owner, peer_of: PeerOf
) -> None:
    ann = await start("ann")
    await watched(ann)
    bob, trainer = await asyncio.gather(start("bob", ann), start("trainer", ann, role=Role.TRAINER, client_mode=True))
    until = time.time() + 60
    assert await bob.directory.store_run(RUN, b"settings", until)
    assert await trainer.directory.find_run(RUN, lambda blob: blob == b"settings") == b"settings"
    # One record is sealed by a host, the other by a trainer: only the host's may say that it holds blocks.
    for node, believed in ((bob, True), (trainer, False)):
        stored = await node.directory.publish(peer_record(node.peer_id, WHOLE, expires_at=until))
        assert stored is believed
    found = await ann.directory.find_hosts(RUN, WHOLE)
    assert [record.peer for record in found] == [bob.peer_id]
