"""A run's identity: its owner's key, its self-certifying id, and its settings, signed by the owner."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import NewType, cast

import msgpack
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from peers.errors import BadRecord
from swarm.config import RunSpec
from swarm.config_file import spec_from_tables, tables_of, write_new_file
from swarm.errors import BadConfig

RunId = NewType("RunId", str)
"""32 hex digits: a hash of the owner's public key, the run's nonce and its name."""

KEY_NAME = "owner.key"
RUN_NAME = "run.signed"  # in a state directory: what `sign_run` made, so that it can be used without the swarm
MAX_RUN_BYTES = 4096  # a DHT value
_FORMAT = 1
_DOMAIN = b"swarmtune run 1\0"
_MAX_KEY_BYTES = 4096


def new_nonce() -> str:
    """32 random hex digits for a new run's `RunSpec.nonce`."""
    return secrets.token_hex(16)


def run_id_of(public_key: bytes, spec: RunSpec) -> RunId:
    """The id of the run that the owner of `public_key` (32 raw bytes) calls by the spec's name and nonce.

    Changing any other setting keeps the id. Nobody else can sign for it: another key gives another id.
    """
    return run_id_from(public_key, nonce=spec.nonce, name=spec.name)


def run_id_from(public_key: bytes, *, nonce: str, name: str) -> RunId:
    """The same from its parts; `nonce` is 32 hex digits."""
    # Key and nonce have fixed lengths, so the concatenation is unambiguous.
    digest = hashlib.sha256(_DOMAIN + public_key + bytes.fromhex(nonce) + name.encode("utf-8", "replace"))
    return RunId(digest.hexdigest()[:32])


def create_owner_key(path: Path) -> Ed25519PrivateKey:
    """Make the run's key and write it to the new file `path` (PEM, mode 0600).

    Raises:
        BadConfig: the file exists or cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_new_file(path, pem, mode=0o600)
    return key


def load_owner_key(path: Path) -> Ed25519PrivateKey:
    """Read the run's key.

    Raises:
        BadConfig: missing, unreadable, or not an Ed25519 key.
    """
    try:
        with path.open("rb") as file:
            pem = file.read(_MAX_KEY_BYTES)
        key = serialization.load_pem_private_key(pem, password=None)
    except FileNotFoundError:
        raise BadConfig(f"{path} does not exist; only the run's owner has it, others join by the join string") from None
    except OSError as error:
        raise BadConfig(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise BadConfig(f"{path} is not an unencrypted PEM key; restore the file that `swarm init` wrote") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise BadConfig(f"{path} is not an Ed25519 key; restore the file that `swarm init` wrote")
    return key


def public_bytes(key: Ed25519PrivateKey) -> bytes:
    """The 32 raw bytes of the public half."""
    return key.public_key().public_bytes_raw()


def sign_run(spec: RunSpec, key: Ed25519PrivateKey) -> bytes:
    """The run's settings with the owner's public key and signature, for `open_run`. Under 4 kB, carries no expiration.

    Raises:
        BadConfig: the settings do not fit into 4 kB.
    """
    body = bytes(msgpack.packb(tables_of(spec)))
    blob = bytes(msgpack.packb([_FORMAT, public_bytes(key), body, key.sign(_DOMAIN + body)]))
    if len(blob) > MAX_RUN_BYTES:
        raise BadConfig(f"the run's settings take {len(blob)} bytes signed, at most {MAX_RUN_BYTES} fit; shorten names")
    return blob


def open_run(blob: bytes, run_id: RunId) -> RunSpec:
    """Parse what `sign_run` made, from wherever it came, and check that it is `run_id`'s owner who signed it.

    Raises:
        BadRecord: malformed, too large, wrongly signed, or of another run.
        BadConfig: signed by the owner, but a setting is not one that this version knows.
    """
    public_key, body, signature = _envelope(blob)
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, _DOMAIN + body)
    except (InvalidSignature, ValueError):
        raise BadRecord(f"run {run_id}: the signature on its settings is wrong; ask another peer") from None
    tables = _unpack(body)
    name, nonce = _named(tables, run_id)
    signed_id = run_id_from(public_key, nonce=nonce, name=name)
    if signed_id != run_id:
        raise BadRecord(f"run {run_id}: these settings are signed for run {signed_id}; use that run's join string")
    return spec_from_tables(cast(Mapping[str, object], tables))


def owner_of(blob: bytes) -> bytes:
    """The public key (32 raw bytes) in settings that `open_run` has checked.

    Raises:
        BadRecord: malformed.
    """
    return _envelope(blob)[0]


def save_run(directory: Path, blob: bytes) -> None:
    """Leave the signed settings in a peer's state directory, replacing older ones of the run whole.

    Raises:
        BadConfig: it cannot be written, or those of another run are there.
    """
    if (directory / RUN_NAME).exists() and load_run(directory)[0] != (run := _id_in(blob)):
        raise BadConfig(f"{directory} holds the state of another run than {run}; give this peer another --state")
    draft = directory / f".{RUN_NAME}.{os.getpid()}"
    try:
        draft.write_bytes(blob)
        draft.replace(directory / RUN_NAME)
    except OSError as error:
        raise BadConfig(
            f"{directory} cannot be written ({error.strerror}); free space or give another --state"
        ) from None


def load_run(directory: Path) -> tuple[RunId, bytes]:
    """What `save_run` left: the id of the run, and the settings that `open_run` checks.

    Raises:
        BadConfig: it cannot be read.
        BadRecord: it is malformed.
    """
    path = directory / RUN_NAME
    try:
        with path.open("rb") as file:
            blob = file.read(MAX_RUN_BYTES + 1)
    except OSError as error:
        raise BadConfig(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    return _id_in(blob), blob


def _id_in(blob: bytes) -> RunId:
    public_key, body, _ = _envelope(blob)
    name, nonce = _named(_unpack(body), "left in a state directory")
    return run_id_from(public_key, nonce=nonce, name=name)


def _named(tables: object, run: str) -> tuple[str, str]:
    """Name and nonce in settings that nobody has checked yet."""
    if not isinstance(tables, dict):
        raise BadRecord(f"run {run}: the signed settings are not a table; ask another peer")
    name, nonce = tables.get("name"), tables.get("nonce")
    if not isinstance(name, str) or not isinstance(nonce, str) or re.fullmatch("[0-9a-f]{32}", nonce) is None:
        raise BadRecord(f"run {run}: the signed settings have no name or nonce; ask another peer")
    return name, nonce


def _envelope(blob: bytes) -> tuple[bytes, bytes, bytes]:
    if len(blob) > MAX_RUN_BYTES:
        raise BadRecord(
            f"the run's record has {len(blob)} bytes, at most {MAX_RUN_BYTES} are allowed; ask another peer"
        )
    parts = _unpack(blob)
    if not isinstance(parts, list) or not parts:
        raise BadRecord("the run's record is malformed; ask another peer")
    if parts[0] != _FORMAT:
        raise BadRecord(f"the run's record has format {parts[0]!r:.20}, this version reads {_FORMAT}; update swarmtune")
    match parts:
        case [_, bytes(public_key), bytes(body), bytes(signature)] if len(public_key) == 32 and len(signature) == 64:
            return public_key, body, signature
    raise BadRecord("the run's record is malformed; ask another peer")


def _unpack(raw: bytes) -> object:
    try:
        value: object = msgpack.unpackb(raw, strict_map_key=True)
    except (ValueError, RecursionError, msgpack.UnpackException):
        raise BadRecord("the run's record is not valid msgpack; ask another peer") from None
    return value
