"""Addresses at which other peers answered, kept on disk, so that a peer whose bootstrap peer is gone finds others.

A hint, never a source of truth: a damaged file is replaced, and a peer is known by its key wherever it answers.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from peers.config import MAX_MULTIADDR_CHARS, MULTIADDR
from peers.errors import NetworkFailed

logger = logging.getLogger(__name__)

MAX_ADDRESSES = 32
_MAX_FILE_BYTES = 64 * 1024


def load_addresses(path: Path) -> tuple[str, ...]:
    """The addresses in `path`, newest first; none when there is no file or it cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
        found = json.loads(data) if len(data) <= _MAX_FILE_BYTES else None
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("address book %s is ignored: %s", path, error)
        return ()
    if not isinstance(found, list):
        logger.warning("address book %s is ignored: it is not a list of addresses", path)
        return ()
    return _good(found)


def save_addresses(path: Path, addresses: Iterable[str]) -> None:
    """Put `addresses` (newest first) before those already in `path`, at most 32 in all; replaces the file at once.

    Raises:
        NetworkFailed: the file cannot be written.
    """
    merged = _good([*addresses, *load_addresses(path)])
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_text(json.dumps(merged, indent=1) + "\n")
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise NetworkFailed(f"address book {path} cannot be written: {error.strerror}; check the directory") from error


def _good(addresses: Iterable[object]) -> tuple[str, ...]:
    """Well-formed addresses that end in a peer id, without repeats, at most 32."""
    good = dict.fromkeys(
        address
        for address in addresses
        if isinstance(address, str)
        and len(address) <= MAX_MULTIADDR_CHARS
        and "/p2p/" in address
        and MULTIADDR.fullmatch(address) is not None
    )
    return tuple(good)[:MAX_ADDRESSES]
