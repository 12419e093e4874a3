import ctypes
import signal

import uvloop

from peers.child_process import spawn
from tests.signals import kept_sigchld


def test_a_loop_hears_of_its_children_after_somebody_took_sigchld() -> None:
    async def run() -> int:
        first = await spawn("true")
        await first.wait()  # libuv listens now
        with kept_sigchld():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return await (await spawn("true")).wait()

    assert uvloop.run(run()) == 0


def test_where_nobody_heard_nothing_changes() -> None:
    libc = ctypes.CDLL(None)
    before = ctypes.create_string_buffer(512)
    libc.sigaction(int(signal.SIGCHLD), None, before)
    with kept_sigchld():
        pass
    after = ctypes.create_string_buffer(512)
    libc.sigaction(int(signal.SIGCHLD), None, after)
    assert before.raw[:8] == after.raw[:8]
