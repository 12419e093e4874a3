"""The run's id certifies itself, and only its owner can sign its settings."""

import stat
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from peers.errors import BadRecord
from swarm.config import ModelSettings, RunSpec, TrainingSettings
from swarm.errors import BadConfig
from swarm.run import (
    MAX_RUN_BYTES,
    RUN_NAME,
    RunId,
    create_owner_key,
    load_owner_key,
    load_run,
    new_nonce,
    open_run,
    public_bytes,
    run_id_of,
    save_run,
    sign_run,
)

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
SPEC = RunSpec(name="tales", nonce="0f" * 16, model=ModelSettings(name="org/m", fingerprint="ab" * 32, num_blocks=4))
RUN_ID = run_id_of(public_bytes(KEY), SPEC)


def test_signed_settings_come_back_equal() -> None:
    blob = sign_run(SPEC, KEY)
    assert open_run(blob, RUN_ID) == SPEC
    assert len(blob) < MAX_RUN_BYTES


def test_the_id_is_32_hex_digits_and_follows_owner_name_and_nonce_only() -> None:
    other = Ed25519PrivateKey.from_private_bytes(b"o" * 32)
    assert len(RUN_ID) == 32
    assert int(RUN_ID, 16) >= 0
    assert run_id_of(public_bytes(KEY), replace(SPEC, training=TrainingSettings(learning_rate=1e-3))) == RUN_ID
    ids = {
        RUN_ID,
        run_id_of(public_bytes(other), SPEC),
        run_id_of(public_bytes(KEY), replace(SPEC, name="tales2")),
        run_id_of(public_bytes(KEY), replace(SPEC, nonce=new_nonce())),
    }
    assert len(ids) == 4


def test_settings_signed_by_another_key_are_refused_for_this_run() -> None:
    forged = sign_run(SPEC, Ed25519PrivateKey.generate())
    with pytest.raises(BadRecord, match="signed for run"):
        open_run(forged, RUN_ID)


def test_settings_of_another_run_of_the_same_owner_are_refused() -> None:
    with pytest.raises(BadRecord, match="signed for run"):
        open_run(sign_run(replace(SPEC, name="other"), KEY), RUN_ID)


def test_a_changed_byte_anywhere_is_refused() -> None:
    blob = sign_run(SPEC, KEY)
    for position in range(0, len(blob), 7):
        torn = blob[:position] + bytes([blob[position] ^ 1]) + blob[position + 1 :]
        with pytest.raises(BadRecord):
            open_run(torn, RUN_ID)


@given(st.binary(max_size=300))
def test_noise_is_refused_with_a_reason(noise: bytes) -> None:
    with pytest.raises(BadRecord):
        open_run(noise, RUN_ID)


def test_oversized_and_deeply_nested_records_are_refused() -> None:
    with pytest.raises(BadRecord, match="bytes"):
        open_run(b"\x00" * (MAX_RUN_BYTES + 1), RUN_ID)
    with pytest.raises(BadRecord):
        open_run(b"\x91" * MAX_RUN_BYTES, RUN_ID)


def test_a_record_of_another_format_says_so() -> None:
    with pytest.raises(BadRecord, match="format 2"):
        open_run(msgpack.packb([2, b"", b"", b""]), RUN_ID)


def test_a_setting_from_a_newer_version_is_named() -> None:
    from swarm.config_file import tables_of
    from swarm.run import _DOMAIN

    body = msgpack.packb(tables_of(SPEC) | {"gossip": 1})
    blob = msgpack.packb([1, public_bytes(KEY), body, KEY.sign(_DOMAIN + body)])
    with pytest.raises(BadConfig, match="gossip"):
        open_run(blob, RUN_ID)


def test_the_owner_key_is_private_and_survives_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "owner.key"
    key = create_owner_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert public_bytes(load_owner_key(path)) == public_bytes(key)
    assert [one.name for one in tmp_path.iterdir()] == ["owner.key"]
    with pytest.raises(BadConfig, match="exists already"):
        create_owner_key(path)


def test_a_missing_or_torn_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="does not exist"):
        load_owner_key(tmp_path / "owner.key")
    torn = tmp_path / "torn.key"
    torn.write_text("-----BEGIN PRIVATE KEY-----\nAAAA")
    with pytest.raises(BadConfig, match="restore"):
        load_owner_key(torn)


def test_signed_settings_left_in_a_directory_name_their_run_and_are_checked_when_opened(tmp_path: Path) -> None:
    blob = sign_run(SPEC, KEY)
    for _ in range(2):
        save_run(tmp_path, blob)
    assert load_run(tmp_path) == (RUN_ID, blob)
    assert [path.name for path in tmp_path.iterdir()] == [RUN_NAME]
    forged = sign_run(replace(SPEC, training=TrainingSettings(batch_size=8)), KEY)
    body = msgpack.unpackb(forged)
    body[3] = msgpack.unpackb(blob)[3]
    (tmp_path / RUN_NAME).write_bytes(msgpack.packb(body))
    run, unchecked = load_run(tmp_path)
    with pytest.raises(BadRecord, match="signature"):
        open_run(unchecked, run)


def test_signed_settings_of_another_run_are_not_replaced(tmp_path: Path) -> None:
    save_run(tmp_path, sign_run(SPEC, KEY))
    with pytest.raises(BadConfig, match="the state of another run"):
        save_run(tmp_path, sign_run(replace(SPEC, name="other"), KEY))
    assert load_run(tmp_path)[0] == RUN_ID


def test_signed_settings_that_are_no_more_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="cannot be read"):
        load_run(tmp_path)
    for noise in (b"", b"noise", b"x" * (MAX_RUN_BYTES + 1), msgpack.packb([1, bytes(32), b"\x80", bytes(64)])):
        (tmp_path / RUN_NAME).write_bytes(noise)
        with pytest.raises(BadRecord):
            load_run(tmp_path)
    with pytest.raises(BadConfig, match="cannot be written"):
        save_run(tmp_path / "missing", sign_run(SPEC, KEY))


def test_an_id_from_another_run_never_opens_the_record() -> None:
    with pytest.raises(BadRecord):
        open_run(sign_run(SPEC, KEY), RunId("0" * 32))
