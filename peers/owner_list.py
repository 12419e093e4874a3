"""A list that a run's owner signs and that travels through anybody's hands: `[format, body, signature]`, in msgpack.

Each kind of list has a domain of its own, so that none can be offered as another.
"""

from __future__ import annotations

import msgpack
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from peers.errors import BadRecord

MAX_LIST_BYTES = 4096  # a DHT value

_FORMAT = 1


def seal_list(fields: list[object], owner: Ed25519PrivateKey, domain: bytes) -> bytes:
    """The list as the owner's word, for `open_list`."""
    body = bytes(msgpack.packb(fields))
    return bytes(msgpack.packb([_FORMAT, body, owner.sign(domain + body)]))


def open_list(blob: bytes, owner: bytes, domain: bytes, what: str) -> object:
    """What the owner signed, not yet parsed; `owner` is the run's public key, 32 raw bytes, `what` names the list.

    Raises:
        BadRecord: malformed, too large, or not signed by the owner.
    """
    if len(blob) > MAX_LIST_BYTES:
        raise BadRecord(f"a list of {what} has {len(blob)} bytes; at most {MAX_LIST_BYTES} are allowed")
    match _unpack(blob, what):
        case [int(form), bytes(body), bytes(signature)] if type(form) is int and form == _FORMAT:
            try:
                Ed25519PublicKey.from_public_bytes(owner).verify(signature, domain + body)
            except (InvalidSignature, ValueError):
                raise BadRecord(f"a list of {what} is not signed by the run's owner") from None
            return _unpack(body, what)
    raise malformed(what)


def malformed(what: str) -> BadRecord:
    """The refusal of a list that says something else than it should."""
    return BadRecord(f"a list of {what} is malformed or of another run")


def _unpack(data: bytes, what: str) -> object:
    try:
        value: object = msgpack.unpackb(data, strict_map_key=True)
    except (ValueError, RecursionError, msgpack.UnpackException):
        raise malformed(what) from None
    return value
