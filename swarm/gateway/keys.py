"""Who may ask: a file of named API keys with limits. Keys are kept as hashes and compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from swarm.errors import BadConfig
from swarm.gateway.failures import ApiFailure

MIN_KEY_CHARS = 16
_MAX_FILE_BYTES = 1 << 20
_MAX_KEYS = 1000
_FIELDS = {"key", "requests_per_minute", "concurrent"}
_EXAMPLE = '[ann]\\nkey = "sk-..." (try: openssl rand -hex 24)'


@dataclass(frozen=True, kw_only=True, slots=True)
class AskerLimits:
    """What one asker may do. None: no bound of its own."""

    requests_per_minute: int | None = None
    concurrent: int | None = None


NO_LIMITS = AskerLimits()


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiKey:
    """Somebody's key, as its hash, and what its owner may do."""

    name: str
    digest: bytes
    limits: AskerLimits


def read_keys(path: Path, defaults: AskerLimits) -> tuple[ApiKey, ...]:
    """The keys of a TOML file: a table for each name with `key`, `requests_per_minute` and `concurrent`; the latter two
    from `defaults` where they are left out.

    Raises:
        BadConfig: the file cannot be read, or an entry is wrong; the message names it, and never a key.
    """
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise BadConfig(f"{path} is larger than {_MAX_FILE_BYTES} bytes; it is no file of API keys")
        tables = tomllib.loads(path.read_text("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(f"the API keys in {path} cannot be read ({error}); check --api-keys") from error
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and as many brackets
        raise BadConfig(f"{path} is not valid TOML ({error}); a key is written as {_EXAMPLE}") from error
    if not tables or len(tables) > _MAX_KEYS:
        raise BadConfig(f"{path} has {len(tables)} keys; use 1 to {_MAX_KEYS}, each as {_EXAMPLE}")
    keys = tuple(_read_key(path, name, table, defaults) for name, table in tables.items())
    if len({key.digest for key in keys}) < len(keys):
        raise BadConfig(f"two names in {path} have the same key; give each its own")
    return keys


def find_key(header: str | None, keys: Sequence[ApiKey]) -> ApiKey:
    """Whose key an Authorization header holds. Takes the same time whichever it is.

    Raises:
        ApiFailure: 401, there is none, or nobody's.
    """
    scheme, _, given = (header or "").partition(" ")
    if scheme.lower() != "bearer" or not given:
        raise ApiFailure(401, "no API key was given; send it as 'Authorization: Bearer KEY'", "missing_api_key")
    digest = _digest(given.strip())
    found = None
    for key in keys:
        if hmac.compare_digest(key.digest, digest):
            found = key
    if found is None:
        raise ApiFailure(401, "this API key is not known here; ask whoever runs this gateway", "invalid_api_key")
    return found


def _read_key(path: Path, name: str, table: object, defaults: AskerLimits) -> ApiKey:
    if not name.isprintable() or not 1 <= len(name) <= 64:
        raise BadConfig(f"a name in {path} is empty, too long or not printable; use 1 to 64 letters")
    if not isinstance(table, Mapping) or not set(table) <= _FIELDS:
        raise BadConfig(f"'{name}' in {path} has to be a table with {', '.join(sorted(_FIELDS))}, such as {_EXAMPLE}")
    secret = table.get("key")
    if not isinstance(secret, str) or len(secret) < MIN_KEY_CHARS or not secret.isascii() or not secret.isprintable():
        raise BadConfig(f"the key of '{name}' in {path} has to be {MIN_KEY_CHARS} or more printable ASCII characters")
    limits = AskerLimits(
        requests_per_minute=_count(path, name, table, "requests_per_minute", defaults.requests_per_minute),
        concurrent=_count(path, name, table, "concurrent", defaults.concurrent),
    )
    return ApiKey(name=name, digest=_digest(secret.strip()), limits=limits)


def _count(path: Path, name: str, table: Mapping[str, object], field: str, default: int | None) -> int | None:
    value = table.get(field, default)
    if value is None or (type(value) is int and 1 <= value <= 1_000_000):
        return value
    raise BadConfig(f"{field} of '{name}' in {path} is {value!r}; use a whole number from 1 to 1000000")


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
