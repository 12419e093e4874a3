"""How a signal ends a command: all is closed in order, as after Ctrl-C. Imports nothing heavy, to be there early."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType

_AGAIN_SECONDS = 0.1


class Stopped(KeyboardInterrupt):
    """A signal asked this command to end. It unwinds like Ctrl-C, so that everything is closed in order."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.exit_code = 128 + number  # as shells expect


def stop_on_signals() -> None:
    """End on SIGTERM and SIGHUP (a closed terminal) as on Ctrl-C: leave the swarm, keep the state. Called once."""
    sys.unraisablehook = _say_again
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _raise_stopped)


def stop_at_end_of(stream: int) -> None:
    """End as on SIGTERM when nobody can write to this file descriptor any more: whoever started this process holds the
    other end of a pipe to it, and is gone, however it ended.
    """
    main = threading.main_thread().ident
    assert main is not None

    def wait() -> None:
        with suppress(OSError):  # what cannot be read has ended, too
            while os.read(stream, 4096):
                pass
        signal.pthread_kill(main, signal.SIGTERM)  # there, as only that wakes what it waits for

    threading.Thread(target=wait, name="whoever started this", daemon=True).start()


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


def _say_again(lost: sys.UnraisableHookArgs) -> None:
    """Python drops what is raised while something is destroyed, which an import does all the time: the same signal
    comes again a moment later, so that no Ctrl-C is lost.
    """
    if isinstance(lost.exc_value, Stopped):
        threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), lost.exc_value.number)).start()
    else:
        sys.__unraisablehook__(lost)
