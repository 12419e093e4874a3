"""The owner's list of those revoked: grows, is signed, and names whom it means."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peers.errors import BadRecord
from peers.network import PeerId
from peers.owner_list import MAX_LIST_BYTES
from peers.private.membership import Membership, Role
from peers.private.revocation import Revocations, newest, open_revocations, sign_revocations
from tests.private_runs import Owner

OWNER = Owner(run="tales")
ANN, BOB = PeerId("QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"), PeerId("Qm" + "b" * 44)
EMPTY = Revocations(run="tales")


def member(
    peer: PeerId, granted_to: PeerId | None = None, *, at: int = 1000, serial: bytes = b"01234567"
) -> Membership:
    grant = OWNER.grant(granted_to or peer, Role.HOST, not_before=at, expires_at=at + 9, serial=serial)
    return Membership(peer=peer, grant=grant)


def test_a_signed_list_comes_back() -> None:
    revoked = EMPTY.with_peer(ANN, 5000).with_serial(b"abcdefgh", 5001)
    blob = sign_revocations(revoked, OWNER.key)
    found = open_revocations(blob, owner=OWNER.public, run="tales")
    assert found == revoked
    assert (found.number, found.blob) == (2, blob)


def test_a_revoked_peer_is_out_with_all_that_it_was_granted_before_and_whom_it_let_in() -> None:
    revoked = EMPTY.with_peer(ANN, 1000)
    assert "was revoked" in revoked.reason(member(ANN))
    assert "was revoked" in revoked.reason(member(BOB, ANN))
    assert "was revoked" in revoked.reason(member(ANN, BOB))
    assert revoked.reason(member(BOB)) == ""
    assert revoked.reason(member(ANN, at=1001)) == ""
    assert (revoked.revoked_at(ANN), revoked.revoked_at(BOB)) == (1000, -1)


def test_a_revoked_serial_is_out_whoever_uses_it() -> None:
    revoked = EMPTY.with_serial(b"abcdefgh", 1000)
    assert "6162636465666768 was revoked" in revoked.reason(member(ANN, serial=b"abcdefgh"))
    assert revoked.reason(member(ANN)) == ""


def test_the_number_grows_and_entries_stay_until_no_membership_can_be_as_old() -> None:
    ten_years = 3661 * 86400
    revoked = EMPTY.with_peer(ANN, 1000).with_peer(BOB, ten_years)
    assert (revoked.number, revoked.revoked_at(ANN)) == (2, 1000)
    later = revoked.with_serial(b"abcdefgh", 1001 + ten_years)
    assert (later.number, later.revoked_at(ANN), later.revoked_at(BOB)) == (3, -1, ten_years)


def test_the_newest_list_wins() -> None:
    first, second = EMPTY.with_peer(ANN, 1), EMPTY.with_peer(ANN, 1).with_peer(BOB, 2)
    assert newest([first, second, EMPTY]) == newest([second, EMPTY, first]) == second


def test_every_bit_flip_and_cut_is_refused() -> None:
    blob = sign_revocations(EMPTY.with_peer(ANN, 5000).with_serial(b"abcdefgh", 5001), OWNER.key)
    for place in range(len(blob)):
        with pytest.raises(BadRecord):
            open_revocations(blob[:place], owner=OWNER.public, run="tales")
        for bit in range(8):
            changed = bytearray(blob)
            changed[place] ^= 1 << bit
            with pytest.raises(BadRecord):
                open_revocations(bytes(changed), owner=OWNER.public, run="tales")


def test_another_owner_and_another_run_are_refused() -> None:
    blob = sign_revocations(EMPTY.with_peer(ANN, 1), OWNER.key)
    with pytest.raises(BadRecord, match="not signed by the run's owner"):
        open_revocations(blob, owner=Owner().public, run="tales")
    with pytest.raises(BadRecord, match="of another run"):
        open_revocations(blob, owner=OWNER.public, run="others")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-5, 2**64 - 1) | st.binary(max_size=20) | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=5),
        max_leaves=10,
    )
)
def test_what_the_owner_signs_by_mistake_is_refused_not_a_crash(value: object) -> None:
    body = msgpack.packb(value)
    with pytest.raises(BadRecord):
        open_revocations(
            msgpack.packb([1, body, OWNER.key.sign(b"swarmtune revoked 1\0" + body)]), owner=OWNER.public, run="tales"
        )


def test_a_list_that_does_not_fit_says_what_to_do() -> None:
    revoked = EMPTY
    for number in range(150):
        revoked = revoked.with_peer(PeerId(f"Qm{number:044}"), 1_700_000_000)
    assert len(sign_revocations(revoked, OWNER.key)) <= MAX_LIST_BYTES
    for number in range(150, 200):
        revoked = revoked.with_peer(PeerId(f"Qm{number:044}"), 1_700_000_000)
    with pytest.raises(BadRecord, match="revoke the serial"):
        sign_revocations(revoked, OWNER.key)
    with pytest.raises(BadRecord, match="at most 4096"):
        open_revocations(bytes(5000), owner=OWNER.public, run="tales")
