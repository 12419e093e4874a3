"""How `swarm pause` reaches a peer in another process: a small file in its state directory, which it looks at.

A peer that holds blocks also locks a file there, so that it is known to run; a lock ends with its process. The word to
pause stays when the peer ends, so one that is started again is still paused.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import stat
from contextlib import suppress
from pathlib import Path

from swarm.errors import BadConfig
from swarm.state import StateDirectory

logger = logging.getLogger(__name__)

PAUSE_NAME = "pause.json"
_HOSTING_NAME = "hosting.lock"
_MAX_BYTES = 256
_WORD = b'{"paused": true}\n'


class PauseFile:
    """Reads one peer's file again and again. What cannot be read is ignored, with a warning once."""

    def __init__(self, state: Path) -> None:
        self._path = state / PAUSE_NAME
        self._warned = ""

    def is_paused(self) -> bool:
        """Whether there is a valid word to pause."""
        try:
            word = _read(self._path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            if reason != self._warned:
                logger.warning("%s is ignored (%s); use `swarm pause` or `swarm resume`", self._path, reason)
            self._warned = reason
            return False
        self._warned = ""
        return word


def say_pause(state: Path) -> None:
    """Ask the peer with this state directory to pause.

    Raises:
        BadConfig: the file cannot be written.
    """
    path = state / PAUSE_NAME
    fresh = path.with_name(f"{PAUSE_NAME}.{os.getpid()}")
    try:
        with suppress(FileNotFoundError):
            fresh.unlink()
        with open(fresh, "xb") as file:
            file.write(_WORD)
        fresh.replace(path)
    except OSError as error:
        raise BadConfig(f"{path} cannot be written ({error.strerror}); pause as the user who runs the peer") from None


def say_resume(state: Path) -> None:
    """Take the word back.

    Raises:
        BadConfig: the file cannot be removed.
    """
    path = state / PAUSE_NAME
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise BadConfig(f"{path} cannot be removed ({error.strerror}); resume as the user who runs the peer") from None


def mark_hosting(state: Path) -> StateDirectory:
    """Say that the process that uses this state directory holds blocks, until `close` or its end.

    Raises:
        BadConfig: the directory cannot be written.
    """
    try:
        handle = os.open(state / _HOSTING_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise BadConfig(f"state directory {state} cannot be used ({error.strerror}); give another --state") from None
    fcntl.flock(handle, fcntl.LOCK_EX)  # nobody holds it for long: the directory is this process's own
    return StateDirectory(state, handle)


def is_hosting(state: Path) -> bool:
    """Whether a process holds blocks with this state directory now."""
    try:
        handle = os.open(state / _HOSTING_NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _read(path: Path) -> bool:
    """What the file says; False where there is none.

    Raises:
        OSError, ValueError: it is no small regular file, or says something else.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("it is no regular file")
        raw = file.read(_MAX_BYTES + 1)
    if len(raw) > _MAX_BYTES:
        raise ValueError(f"it has more than {_MAX_BYTES} bytes")
    try:
        word = json.loads(raw)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    if not isinstance(word, dict) or type(word.get("paused")) is not bool:
        raise ValueError("it does not say whether to pause")
    return bool(word["paused"])
