"""Only what the owner signed, for this run and this peer, is a membership."""

from __future__ import annotations

import secrets
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from peers.errors import BadMembership
from peers.identity import Identity, load_or_create
from peers.network import PeerId
from peers.private.membership import (
    MAX_MEMBERSHIP_BYTES,
    Grant,
    Membership,
    Role,
    let_in_by_bearer,
    let_in_by_member,
    open_grant,
    open_membership,
    sign_grant,
)
from tests.private_runs import Owner

OWNER = Owner(run="tales")
ANN, EVE = PeerId("QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"), PeerId("Qm" + "a" * 44)


@cache
def identity(name: str) -> Identity:
    return load_or_create(Path(mkdtemp()) / name)


def opened(blob: bytes, peer: str = ANN, run: str = "tales", owner: Owner = OWNER) -> Membership:
    return open_membership(blob, owner=owner.public, run=run, peer=PeerId(peer))


def by_bearer(peer: PeerId, key: Ed25519PrivateKey, granted_to: Ed25519PrivateKey) -> bytes:
    grant = OWNER.grant(None, bearer=granted_to.public_key().public_bytes_raw())
    return let_in_by_bearer(sign_grant(grant, OWNER.key), key, peer)


@cache
def samples() -> dict[str, bytes]:
    """One membership of ANN of each kind, all for the same run."""
    key = Ed25519PrivateKey.generate()
    bob = identity("bob")
    return {
        "direct": OWNER.sign(ANN),
        "bearer": by_bearer(ANN, key, key),
        "member": let_in_by_member(OWNER.sign(bob.peer), bob, ANN),
    }


@pytest.mark.parametrize("kind", ["direct", "bearer", "member"])
def test_a_membership_comes_back_as_it_was_granted(kind: str) -> None:
    membership = opened(samples()[kind])
    assert (membership.peer, membership.role, membership.grant.run) == (ANN, Role.HOST, "tales")
    assert len(samples()[kind]) < MAX_MEMBERSHIP_BYTES


@pytest.mark.parametrize("role", list(Role))
def test_every_field_of_a_grant_survives(role: Role) -> None:
    grant = Grant(run="tales", role=role, not_before=7, expires_at=99, serial=secrets.token_bytes(8), peer=ANN)
    assert (
        opened(sign_grant(grant, OWNER.key)).grant
        == grant
        == open_grant(sign_grant(grant, OWNER.key), owner=OWNER.public, run="tales")
    )


@pytest.mark.parametrize("kind", ["direct", "bearer", "member"])
def test_every_bit_flip_is_refused(kind: str) -> None:
    blob = samples()[kind]
    for place in range(len(blob)):
        for bit in range(8):
            changed = bytearray(blob)
            changed[place] ^= 1 << bit
            with pytest.raises(BadMembership):
                opened(bytes(changed))


@pytest.mark.parametrize("kind", ["direct", "bearer", "member"])
def test_every_cut_and_every_addition_is_refused(kind: str) -> None:
    blob = samples()[kind]
    for length in range(len(blob)):
        with pytest.raises(BadMembership):
            opened(blob[:length])
    with pytest.raises(BadMembership):
        opened(blob + b"\0")


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(BadMembership):
        opened(noise)


NESTED = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**64 - 1) | st.binary(max_size=40) | st.text(max_size=60),
    lambda inner: st.lists(inner, max_size=7),
    max_leaves=12,
)


@given(NESTED)
def test_whatever_the_owner_signs_by_mistake_is_refused_not_a_crash(value: object) -> None:
    body = msgpack.packb(value)
    blob = msgpack.packb([1, body, OWNER.key.sign(b"swarmtune membership 1\0" + body)])
    with pytest.raises(BadMembership):
        opened(blob)


@given(NESTED)
def test_a_third_party_that_adds_something_is_refused(value: object) -> None:
    with pytest.raises(BadMembership):
        opened(msgpack.packb([*msgpack.unpackb(samples()["direct"]), value]))


def test_another_owner_another_run_and_another_peer_are_refused() -> None:
    with pytest.raises(BadMembership, match="not signed by this run's owner"):
        opened(Owner(run="tales").sign(ANN))
    with pytest.raises(BadMembership, match="of run tales, not of others"):
        opened(OWNER.sign(ANN), run="others")
    for blob in samples().values():
        with pytest.raises(BadMembership, match="each peer needs its own"):
            opened(blob, EVE)


def test_only_the_key_that_was_granted_may_let_in() -> None:
    granted, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    with pytest.raises(BadMembership, match="not passed on by the one"):
        opened(by_bearer(EVE, other, granted), EVE)
    bob, eve = identity("bob"), identity("eve")
    with pytest.raises(BadMembership, match="not passed on by the one"):
        opened(let_in_by_member(OWNER.sign(bob.peer), eve, eve.peer), eve.peer)
    # Nor is what let one peer in good for another one, or under another grant of the same peer.
    passed = msgpack.unpackb(let_in_by_member(OWNER.sign(bob.peer), bob, ANN))
    with pytest.raises(BadMembership):
        opened(msgpack.packb([*passed[:3], [EVE, *passed[3][1:]]]), EVE)
    fresh = msgpack.unpackb(OWNER.sign(bob.peer))
    with pytest.raises(BadMembership):
        opened(msgpack.packb([*fresh, passed[3]]))


def test_whoever_was_let_in_cannot_let_in_others() -> None:
    bob, eve = identity("bob"), identity("eve")
    blob = let_in_by_member(OWNER.sign(bob.peer), bob, eve.peer)
    with pytest.raises(BadMembership):
        open_grant(blob, owner=OWNER.public, run="tales")
    with pytest.raises(BadMembership):
        opened(let_in_by_member(blob, eve, ANN))


@pytest.mark.parametrize(
    "wrong",
    [{"not_before": 99, "expires_at": 99}, {"serial": b"short"}, {"peer": PeerId("x")}, {"bearer": b"1", "peer": None}],
)
def test_a_grant_that_cannot_be_right_is_refused(wrong: dict[str, object]) -> None:
    grant = replace(OWNER.grant(ANN), **wrong)  # type: ignore[arg-type]
    with pytest.raises(BadMembership, match="malformed"):
        opened(sign_grant(grant, OWNER.key))


def test_it_counts_from_its_beginning_to_its_end_and_a_few_seconds_of_skew() -> None:
    membership = opened(OWNER.sign(ANN, not_before=1000, expires_at=2000))
    for now in (995.5, 1000, 1500, 2000, 2004.5):
        membership.check_time(now)
    with pytest.raises(BadMembership, match="begins in 6 s"):
        membership.check_time(994)
    with pytest.raises(BadMembership, match="expired 6 s ago"):
        membership.check_time(2006)


def test_a_role_covers_itself_and_the_lesser_ones() -> None:
    covered = {(role, other) for role in Role for other in Role if role.covers(other)}
    client, trainer, host = Role.CLIENT, Role.TRAINER, Role.HOST
    assert covered == {
        *((role, role) for role in Role),
        (trainer, client),
        (host, client),
        (host, trainer),
    }
