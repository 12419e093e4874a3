"""Signal handlers that Python does not know of."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_MOST_BYTES = 512  # of a `struct sigaction`, on any system


@contextmanager
def kept_sigchld() -> Iterator[None]:
    """Puts back who hears of ended children, where somebody did.

    libuv sets that once, for all loops of a process, and Lightning sets what Python knows of after each fit, which is
    nobody: a later test in the same worker would wait for good for its child's end.
    """
    libc = ctypes.CDLL(None)
    before = ctypes.create_string_buffer(_MOST_BYTES)
    libc.sigaction(int(signal.SIGCHLD), None, before)
    try:
        yield
    finally:
        if int.from_bytes(before.raw[: ctypes.sizeof(ctypes.c_void_p)], sys.byteorder):  # the handler comes first
            libc.sigaction(int(signal.SIGCHLD), before, None)
