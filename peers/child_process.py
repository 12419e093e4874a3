"""A child process of an event loop: started in turn, and its end seen whoever sets signal handlers."""

from __future__ import annotations

import asyncio
import os
import threading

_TURN_SECONDS = 0.01
_LOOK_SECONDS = 0.25
_HEARD_SECONDS = 1.0  # from a child's end until its loop has heard of it, however busy
_SPAWNING = threading.Lock()  # uvloop refuses to start a process while another loop of this process does


async def spawn(*command: str) -> asyncio.subprocess.Process:
    """Start a process that says everything on its stdout. Wait, within a deadline of the caller's, for a turn to do so.

    Raises:
        OSError: there is no such program.
    """
    while True:
        if _SPAWNING.acquire(blocking=False):  # not a blocking wait: whose turn it is may be on this same loop
            break
        await asyncio.sleep(_TURN_SECONDS)
    try:
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
    finally:
        _SPAWNING.release()


async def ended(child: asyncio.subprocess.Process) -> None:
    """Wait until a child of this process has ended.

    The loop hears of that by SIGCHLD, and no more once a library sets all handlers back to what Python knows of, as
    Lightning does after each fit: so the kernel is asked, too.
    """
    heard = asyncio.ensure_future(child.wait())
    try:
        while not heard.done() and _is_running(child.pid):
            await asyncio.wait([heard], timeout=_LOOK_SECONDS)
        await asyncio.wait([heard], timeout=_HEARD_SECONDS)
        if not heard.done():
            _reap(child.pid)
    finally:
        heard.cancel()


def _is_running(pid: int) -> bool:
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:  # the loop has taken its exit code
        return False


def _reap(pid: int) -> None:
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return
