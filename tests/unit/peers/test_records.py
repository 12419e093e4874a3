from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks.spans import Span
from peers.errors import BadRecord
from peers.identity import Identity
from peers.network import PeerId
from peers.records import (
    AWAY,
    MAX_GIVEN_TOKENS,
    MAX_PUBLISHED,
    MAX_SEALED_BYTES,
    Keeping,
    PeerRecord,
    ProgressRecord,
    SealCache,
    TrainerRecord,
    open_record,
    open_sealed,
    seal,
    seal_record,
)
from peers.units.keeping import Copy, told
from tests.fakes import RUN, fake_peer_id, new_identity, peer_record

NOW = 1000.0


@pytest.fixture(scope="module")
def ann(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return new_identity(tmp_path_factory.mktemp("identity"), "ann")


def payload_of(record: PeerRecord, ann: Identity) -> dict[str, object]:
    return dict(open_sealed(seal_record(ann, record), "peer")[1])


def progress(peer: str, **changes: object) -> ProgressRecord:
    record = ProgressRecord(
        run=RUN, peer=PeerId(peer), span=Span(2, 4), round=1, samples=5, total_samples=9, expires_at=1060.0
    )
    return replace(record, **changes)  # type: ignore[arg-type]


def test_every_record_comes_back_as_it_was(ann: Identity) -> None:
    host = replace(peer_record(ann.peer, Span(0, 15)), roles=("host", "trainer"))
    host = replace(host, capacity=20, pinned=True, since=990.0, moved=True, moves_to=Span(3, 9))
    host = replace(host, served_tokens=MAX_GIVEN_TOKENS, trained_tokens=7, adapters=(b"ABCDEFGH", b"abcdefgh"))
    assert open_record(seal_record(ann, host), PeerRecord, run=RUN, now=NOW) == host
    for away in AWAY:
        rests = replace(host, roles=(), away=away)
        assert open_record(seal_record(ann, rests), PeerRecord, run=RUN, now=NOW) == rests
    kept = (Keeping(Span(9, 11), 3, b"ABCDEFGHabcdefgh"), Keeping(Span(11, 12), 2, b"12345678"))
    moving = progress(ann.peer, digests=b"0123456789abcdef", proposal=(2, 1010.5, 1.5), keeps=kept, away="hours")
    assert open_record(seal_record(ann, moving), ProgressRecord, run=RUN, now=NOW) == moving
    assert moving.digest_of(3) == b"89abcdef"
    assert moving.digest_of(4) is None
    assert [moving.kept(block) for block in (8, 10, 11)] == [None, (3, b"abcdefgh"), (2, b"12345678")]
    trainer = TrainerRecord(
        run=RUN, peer=ann.peer, loss=2.5, eval_loss=None, tokens_per_second=10.0, step=4, round=1, expires_at=1060.0
    )
    for record in (trainer, replace(trainer, left=True)):
        assert open_record(seal_record(ann, record), TrainerRecord, run=RUN, now=NOW) == record


def test_a_full_record_stays_under_four_kilobytes(ann: Identity) -> None:
    address = "/ip4/100.100.100.100/tcp/31337/p2p/" + "Q" * 46
    full = replace(peer_record(ann.peer, Span(0, 15)), addresses=(address,) * 4, nickname="n" * 48)
    full = replace(full, adapters=tuple(bytes([number]) * 8 for number in range(MAX_PUBLISHED)))
    assert len(seal_record(ann, full)) < MAX_SEALED_BYTES / 2
    with pytest.raises(BadRecord, match="at most 4096 fit"):
        seal_record(ann, progress(ann.peer, span=Span(0, 1000), digests=b"x" * 8000))


@pytest.mark.parametrize("adapters", [[b"7 bytes"], [b"9  bytes."], ["letters."], [b"8 bytes."] * 17, b"8 bytes.", 1])
def test_marks_of_adapters_that_cannot_be_are_refused(ann: Identity, adapters: object) -> None:
    payload = payload_of(peer_record(ann.peer, Span(0, 15)), ann) | {"adapters": adapters}
    with pytest.raises(BadRecord, match="adapters"):
        open_record(seal(ann, "peer", payload), PeerRecord, run=RUN, now=NOW)


@pytest.mark.parametrize("held", [1, 128, 200])
def test_what_is_told_of_kept_units_never_fills_a_record(ann: Identity, held: int) -> None:
    scattered = {f"a/block.{1000 + 2 * n}": Copy(round=2**40 - n, digest=bytes(8)) for n in range(2000)}
    in_a_row = {f"a/block.{1000 + n}": Copy(round=2**40, digest=bytes(8)) for n in range(2000)}
    for kept in (scattered, in_a_row):
        keeps = told(kept, Span(0, held))
        assert keeps
        seal_record(ann, progress(ann.peer, span=Span(0, held), digests=bytes(8 * held), round=2**40, keeps=keeps))


@pytest.mark.parametrize(
    "keeps",
    [
        [[[9, 11], 3, b"x" * 15]],
        [[[9, 11], 3, b"x" * 24]],
        [[[11, 9], 3, b"x" * 16]],
        [[[9, 11], -1, b"x" * 16]],
        [[[9, 11], True, b"x" * 16]],
        [[[9, 11], 2**41, b"x" * 16]],
        [[[9, 5000], 3, b"x" * 8]],
        [[[9, 10], 3]],
        [[[9, 10], 3, b"x" * 8]] * 49,
        "no list",
    ],
)
def test_kept_units_that_cannot_be_right_are_refused(ann: Identity, keeps: object) -> None:
    payload = dict(open_sealed(seal_record(ann, progress(ann.peer)), "progress")[1])
    with pytest.raises(BadRecord, match="'keeps'"):
        open_record(seal(ann, "progress", payload | {"keeps": keeps}, most=10**6), ProgressRecord, run=RUN, now=NOW)


def test_another_peers_record_can_neither_be_signed_nor_passed_off(ann: Identity, tmp_path: Path) -> None:
    bob = new_identity(tmp_path, "bob")
    with pytest.raises(BadRecord, match="cannot sign"):
        seal_record(ann, peer_record(bob.peer, Span(0, 2)))
    forged = payload_of(peer_record(ann.peer, Span(0, 2)), ann) | {"peer": bob.peer}
    with pytest.raises(BadRecord, match="is signed by"):
        open_record(seal(ann, "peer", forged), PeerRecord, run=RUN, now=NOW)


def test_a_changed_byte_anywhere_is_refused(ann: Identity) -> None:
    blob = seal_record(ann, peer_record(ann.peer, Span(0, 2)))
    cache = SealCache()
    open_record(blob, PeerRecord, run=RUN, now=NOW, cache=cache)
    for position in range(0, len(blob), 7):
        changed = blob[:position] + bytes([blob[position] ^ 1]) + blob[position + 1 :]
        with pytest.raises(BadRecord):
            open_record(changed, PeerRecord, run=RUN, now=NOW, cache=cache)


def test_a_record_of_another_kind_run_or_time_is_refused(ann: Identity) -> None:
    blob = seal_record(ann, peer_record(ann.peer, Span(0, 2)))
    with pytest.raises(BadRecord, match="malformed"):
        open_record(blob, ProgressRecord, run=RUN, now=NOW)
    with pytest.raises(BadRecord, match="of run"):
        open_record(blob, PeerRecord, run="other", now=NOW)
    with pytest.raises(BadRecord, match="expired 40 s ago"):
        open_record(blob, PeerRecord, run=RUN, now=1100.0)
    with pytest.raises(BadRecord, match="claims to live"):
        open_record(blob, PeerRecord, run=RUN, now=-9e5)
    _kind, packed, key, signature = msgpack.unpackb(blob)
    with pytest.raises(BadRecord, match="wrong signature"):
        open_sealed(msgpack.packb(["trainer", packed, key, signature]), "trainer")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("span", [5, 5]),
        ("span", [0, 5000]),
        ("span", [True, 3]),
        ("span", "0:3"),
        ("tokens_per_second", float("nan")),
        ("tokens_per_second", float("inf")),
        ("tokens_per_second", -1.0),
        ("tokens_per_second", True),
        ("queue_seconds", 1e300),
        ("round", -1),
        ("round", 1.5),
        ("cache_free_bytes", 2**61),
        ("addresses", ["/ip4/1.2.3.4/tcp/1"] * 5),
        ("addresses", ["http://example.org"]),
        ("addresses", ["/ip4/1.2.3.4/tcp/1\n"]),
        ("protocol", [3, 2]),
        ("nickname", "x" * 49),
        ("nickname", "\x1b[2J"),
        ("software", 5),
        ("dtype", "F32; rm"),
        ("roles", ["king"]),
        ("capacity", -1),
        ("capacity", 4097),
        ("pinned", 1),
        ("since", float("inf")),
        ("since", -1.0),
        ("moved", "yes"),
        ("moves_to", [3, 3]),
        ("peer", "0OIl"),
        ("run", "a/b"),
        ("expires_at", float("inf")),
        ("expires_at", None),
        ("away", "gone"),
        ("away", "hand\n"),
        ("away", None),
        ("served_tokens", -1),
        ("served_tokens", 2**53 + 1),
        ("served_tokens", 1.5),
        ("trained_tokens", True),
        ("trained_tokens", 2**64 - 1),
        ("trained_tokens", None),
    ],
)
def test_a_field_that_cannot_be_right_is_refused_by_name(ann: Identity, field: str, value: object) -> None:
    payload = payload_of(peer_record(ann.peer, Span(0, 2)), ann)
    with pytest.raises(BadRecord, match=f"'{field}'"):
        open_record(seal(ann, "peer", payload | {field: value}), PeerRecord, run=RUN, now=NOW)
    missing = {key: kept for key, kept in payload.items() if key != "span"}
    with pytest.raises(BadRecord, match="'span' is missing"):
        open_record(seal(ann, "peer", missing), PeerRecord, run=RUN, now=NOW)


def test_digests_of_another_length_than_the_span_are_refused(ann: Identity) -> None:
    with pytest.raises(BadRecord, match="digests"):
        seal_record(ann, progress(ann.peer, digests=b"x" * 8))


def test_a_record_of_an_earlier_version_says_nothing_of_what_its_peer_has_given(ann: Identity) -> None:
    said = replace(peer_record(ann.peer, Span(0, 2)), served_tokens=5, trained_tokens=7)
    payload = payload_of(said, ann)
    del payload["served_tokens"], payload["trained_tokens"]
    found = open_record(seal(ann, "peer", payload), PeerRecord, run=RUN, now=NOW)
    assert found == replace(said, served_tokens=0, trained_tokens=0)


def test_fields_of_later_versions_are_ignored(ann: Identity) -> None:
    payload = payload_of(peer_record(ann.peer, Span(0, 2)), ann) | {"colour": "red"}
    assert open_record(seal(ann, "peer", payload), PeerRecord, run=RUN, now=NOW).nickname == "ann"


@settings(max_examples=300)
@given(st.binary(max_size=5000))
def test_rubbish_is_a_bad_record_and_nothing_else(blob: bytes) -> None:
    with pytest.raises(BadRecord):
        open_record(blob, PeerRecord, run=RUN, now=NOW)


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def payload(ann: Identity) -> dict[str, object]:
    return payload_of(peer_record(ann.peer, Span(0, 2)), ann)


@settings(max_examples=200, deadline=None)
@given(field=st.sampled_from([f for f in PeerRecord.__dataclass_fields__ if f != "kind"]), value=_VALUES)
def test_any_value_in_any_field_is_read_or_refused(
    ann: Identity, payload: dict[str, object], field: str, value: object
) -> None:
    try:
        record = open_record(seal(ann, "peer", payload | {field: value}), PeerRecord, run=RUN, now=NOW)
    except BadRecord:
        return
    assert record.peer == ann.peer
    seal_record(ann, record)


@settings(max_examples=200)
@given(_VALUES)
def test_any_msgpack_value_as_an_envelope_is_refused(value: object) -> None:
    with pytest.raises(BadRecord):
        open_sealed(msgpack.packb(value), "peer")


def test_the_cache_of_verified_seals_is_bounded() -> None:
    cache = SealCache(size=2)
    for digest in (b"a", b"b", b"c"):
        cache.add(digest)
    assert b"a" not in cache
    assert b"b" in cache
    assert b"c" in cache


def test_fake_peer_ids_are_well_formed(ann: Identity) -> None:
    payload = payload_of(peer_record(ann.peer, Span(0, 2)), ann) | {"peer": fake_peer_id("x")}
    with pytest.raises(BadRecord, match="is signed by"):
        open_record(seal(ann, "peer", payload), PeerRecord, run=RUN, now=NOW)
