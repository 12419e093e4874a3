"""The list of those revoked, at a running peer and on disk: read from the swarm and from files, kept, passed on."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from peers.errors import BadRecord
from peers.private.gate import Gate
from peers.private.membership import Role
from peers.private.revocation import Revocations, newest, open_revocations, sign_revocations
from swarm.errors import BadConfig
from swarm.run import RunId
from swarm.signed_lists import read_lists, save_list

logger = logging.getLogger(__name__)

REVOKED_NAME = "revoked.signed"  # in a run's directory, and in state directories
LOOK_SECONDS = 3.0
_STORE_SECONDS = 60.0
LIFE_SECONDS = 600.0


class RevokedStore(Protocol):
    """Where peers leave the list for each other."""

    async def store_revoked(self, run: str, blob: bytes, expires_at: float) -> bool:
        """Keep a list until it expires (unix seconds)."""

    async def find_revoked(self, run: str) -> list[bytes]:
        """All lists that peers have stored."""


def load_revoked(directories: Sequence[Path], *, owner: bytes, run: RunId) -> Revocations:
    """The newest list in any of these directories; the empty one where there is none. What is not the owner's is
    skipped, and said in the log.
    """
    return newest([Revocations(run=run), *_on_disk(directories, owner, run)])


def save_revoked(directory: Path, blob: bytes) -> None:
    """Leave a signed list in a directory, replacing an older one whole.

    Raises:
        BadConfig: it cannot be written.
    """
    save_list(directory / REVOKED_NAME, blob)


def sign_and_save(revoked: Revocations, key: Ed25519PrivateKey, directory: Path) -> bytes:
    """The owner's next list, signed and left in the run's directory.

    Raises:
        BadConfig: it cannot be written.
        BadRecord: it is full.
    """
    blob = sign_revocations(revoked, key)
    save_revoked(directory, blob)
    return blob


class RevocationWatch:
    """Keeps one peer's gate at the newest list. The first of `directories` is this peer's state."""

    def __init__(self, store: RevokedStore, gate: Gate, owner: bytes, run: RunId, directories: Sequence[Path]) -> None:
        self._store, self._gate, self._directories = store, gate, tuple(directories)
        self._owner, self._run = owner, run
        self.is_spread = False
        """Whether other peers took the newest list, when this one offered it last."""
        self._stored_at = 0.0
        self._stored = self._kept = -1

    async def run(self) -> None:
        """Look every few seconds, until cancelled.

        Raises:
            BadMembership: this peer itself was revoked, or its membership is over.
        """
        while True:
            await self.look()
            self._gate.check_own()  # after the list is kept, which may name this peer
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Take the newest list there is, and see that the swarm has it."""
        found = [self._gate.revoked]
        found += await asyncio.to_thread(_on_disk, self._directories, self._owner, self._run)
        for blob in await self._store.find_revoked(self._run):
            found += _opened(blob, self._owner, self._run, "in the swarm")
        revoked = newest(found)
        if not revoked.blob:
            return
        if self._gate.revoke(revoked):
            logger.warning("the owner has revoked memberships; list %d is in force", revoked.number)
        if revoked.number > self._kept:
            try:
                await asyncio.to_thread(save_revoked, self._directories[0], revoked.blob)
                self._kept = revoked.number
            except BadConfig as error:
                logger.warning("%s", error)
        is_due = revoked.number > self._stored or time.monotonic() > self._stored_at + _STORE_SECONDS
        if not is_due or not self._gate.own.role.covers(Role.TRAINER):
            return
        self.is_spread = await self._store.store_revoked(self._run, revoked.blob, time.time() + LIFE_SECONDS)
        if self.is_spread:
            self._stored, self._stored_at = revoked.number, time.monotonic()


def _on_disk(directories: Sequence[Path], owner: bytes, run: RunId) -> list[Revocations]:
    found: list[Revocations] = []
    for directory, blob in read_lists(directories, REVOKED_NAME):
        found += _opened(blob, owner, run, str(directory))
    return found


def _opened(blob: bytes, owner: bytes, run: RunId, where: str) -> list[Revocations]:
    try:
        return [open_revocations(blob, owner=owner, run=run)]
    except BadRecord as error:
        logger.warning("a list of those revoked was skipped where=%s reason=%s", where, error)
        return []
