"""A private directory for the sockets between a peer and its p2pd, and the removal of those that dead peers left.

`kill -9` leaves the directory behind. Its owner holds a lock on a file in it for as long as it lives, so whoever gets
that lock knows that the owner is gone. Directories without that file are not touched.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import stat
import tempfile
from itertools import islice
from pathlib import Path

logger = logging.getLogger(__name__)

PREFIX = "swarmtune-"
LOCK_NAME = "owner"
_MOST_SWEPT = 1000  # of one start; the rest is for the next


class SocketDirectory:
    """A directory that only this user can enter (0700), locked until `remove`. Made by `create`."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock: int | None = lock

    @classmethod
    def create(cls, parent: Path | None = None) -> SocketDirectory:
        """A new directory in `parent` (the system's temporary directory); what dead peers left there is removed.

        Raises:
            OSError: it cannot be made.
        """
        parent = parent or Path(tempfile.gettempdir())
        sweep(parent)
        while True:
            path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            lock = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            if _take(lock) and path.exists():
                return cls(path, lock)
            os.close(lock)  # another peer swept in the moment before it was locked

    def remove(self) -> None:
        """Remove it with its sockets. Doing so twice is harmless."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def sweep(parent: Path) -> None:
    """Remove this user's directories whose owners are gone."""
    for path in islice(parent.glob(f"{PREFIX}*"), _MOST_SWEPT):
        try:
            found = path.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                continue
            lock = os.open(path / LOCK_NAME, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # no such file, or gone in this moment
            continue
        try:
            if _take(lock):
                shutil.rmtree(path, ignore_errors=True)
                logger.info("removed what a dead peer left path=%s", path)
        finally:
            os.close(lock)


def _take(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
