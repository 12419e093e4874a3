"""Who a peer is: a libp2p RSA key in a file, its peer id, signatures, and the lock that keeps the file to one process.

The file is the one that p2pd and hivemind use: a protobuf of two fields, the key's type and its PKCS#1 DER. No hivemind
here: the two fields are written and read by hand, so that a client may check signatures without the network stack.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from peers.errors import BadIdentity
from peers.network import PeerId

logger = logging.getLogger(__name__)

_MAX_FILE_BYTES = 16 * 1024
_MIN_KEY_BITS, _MAX_KEY_BITS = 2048, 4096  # larger keys would let a stranger's record cost us milliseconds each
_EXPONENT = 65537
_SHA256_MULTIHASH = b"\x12\x20"  # code and length, from the libp2p peer id specification
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_PSS = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=hashes.SHA256.digest_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """A peer's key. `public_key` is SubjectPublicKeyInfo DER, what `verify` takes at the other end."""

    peer: PeerId
    public_key: bytes
    _key: rsa.RSAPrivateKey = field(repr=False)

    def sign(self, data: bytes) -> bytes:
        """RSA-PSS with SHA-256 over `data`; 256 bytes for a 2048-bit key, about 1 ms: not for a hot path."""
        return self._key.sign(data, _PSS, hashes.SHA256())


def load_or_create(path: Path) -> Identity:
    """The identity in `path`; a new one is made when there is none. Two processes that start at once get the same.

    Raises:
        BadIdentity: the file cannot be read, written or parsed.
    """
    try:
        if not path.exists():
            _create(path)
        data = path.read_bytes() if path.stat().st_size <= _MAX_FILE_BYTES else b""
        if path.stat().st_mode & 0o077:
            logger.warning("identity %s can be read by others; run: chmod 600 %s", path, path)
    except OSError as error:
        raise BadIdentity(f"identity {path} cannot be used: {error.strerror}; check its directory and owner") from error
    return _parse(path, data)


def peer_in(path: Path) -> PeerId | None:
    """Whose key is in `path`; None where there is no key. Fast, as the key is not checked: not for signing.

    Raises:
        BadIdentity: the file cannot be read or parsed.
    """
    if not path.exists():
        return None
    try:
        return _parse(path, path.read_bytes()[:_MAX_FILE_BYTES], is_checked=False).peer
    except OSError as error:
        raise BadIdentity(f"identity {path} cannot be used: {error.strerror}; check its directory and owner") from error


def peer_id_of(public_key: bytes) -> PeerId:
    """The libp2p id of a public key in SubjectPublicKeyInfo DER: base58 of the multihash of its protobuf."""
    digest = hashlib.sha256(_protobuf_of_key(public_key)).digest()
    return PeerId(_base58(_SHA256_MULTIHASH + digest))


def verify(peer: PeerId, public_key: bytes, data: bytes, signature: bytes) -> bool:
    """Whether `signature` over `data` was made by the key of `peer`. False for any malformed input; about 0.1 ms."""
    if len(public_key) > _MAX_KEY_BITS // 4 or peer_id_of(public_key) != peer:
        return False
    try:
        key = serialization.load_der_public_key(public_key)
        if not isinstance(key, rsa.RSAPublicKey) or not _MIN_KEY_BITS <= key.key_size <= _MAX_KEY_BITS:
            return False
        if key.public_numbers().e != _EXPONENT:
            return False
        key.verify(signature, data, _PSS, hashes.SHA256())
    except (ValueError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


class IdentityLock:
    """Held while a process uses an identity; the kernel lets go of it when the process ends, however it ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """Let another process have the identity. Doing so twice is harmless."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> IdentityLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def hold(path: Path) -> IdentityLock:
    """Take the identity file for this process, through a lock file beside it.

    Raises:
        BadIdentity: another process on this machine holds it, or the lock file cannot be written.
    """
    lock_path = path.with_name(path.name + ".lock")
    try:
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise BadIdentity(f"identity lock {lock_path} cannot be opened: {error.strerror}; check its owner") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    except OSError as error:
        holder = os.pread(descriptor, 20, 0).decode(errors="replace")
        os.close(descriptor)
        if not isinstance(error, BlockingIOError):
            raise BadIdentity(
                f"identity lock {lock_path} cannot be taken ({error.strerror}); put --state on a local disk"
            ) from error
        raise BadIdentity(
            f"identity {path} is in use by process {holder or 'unknown'}; stop it or give this peer another --state"
        ) from error
    return IdentityLock(descriptor)


def _new_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=_EXPONENT, key_size=_MIN_KEY_BITS)


def _create(path: Path) -> None:
    key = _new_key()
    der = key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(_protobuf_of_key(der))
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)  # unlike rename, never replaces the key that another process has just made
    except FileExistsError:
        logger.debug("identity %s was made by another process at the same moment", path)
    finally:
        draft.unlink()


def _parse(path: Path, data: bytes, *, is_checked: bool = True) -> Identity:
    try:
        key = serialization.load_der_private_key(
            _key_in_protobuf(data), password=None, unsafe_skip_rsa_key_validation=not is_checked
        )
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BadIdentity(f"identity {path} is not a libp2p RSA key; move it away and a new one is made") from error
    if not isinstance(key, rsa.RSAPrivateKey) or not _MIN_KEY_BITS <= key.key_size <= _MAX_KEY_BITS:
        raise BadIdentity(f"identity {path} is not an RSA key of {_MIN_KEY_BITS} to {_MAX_KEY_BITS} bits; move it away")
    public_key = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return Identity(peer=peer_id_of(public_key), public_key=public_key, _key=key)


def _protobuf_of_key(der: bytes) -> bytes:
    """`crypto.pb.PrivateKey` and `PublicKey` alike: field 1 the type (0 is RSA), field 2 the bytes."""
    length, size = b"", len(der)
    while size > 0x7F:
        length += bytes([size & 0x7F | 0x80])
        size >>= 7
    return b"\x08\x00\x12" + length + bytes([size]) + der


def _key_in_protobuf(data: bytes) -> bytes:
    """The inverse of `_protobuf_of_key`, for RSA keys only; ValueError for anything else."""
    if data[:3] != b"\x08\x00\x12":
        raise ValueError("not an RSA key protobuf")
    size, position = 0, 3
    for shift in (0, 7, 14):
        if position >= len(data):
            break
        size |= (data[position] & 0x7F) << shift
        position += 1
        if not data[position - 1] & 0x80:
            break
    if len(data) != position + size:
        raise ValueError("a torn key protobuf")
    return data[position:]


def _base58(data: bytes) -> str:
    number, text = int.from_bytes(data, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        text = _BASE58[digit] + text
    return "1" * (len(data) - len(data.lstrip(b"\0"))) + text
