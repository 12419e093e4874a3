"""Loops of one process start daemons at the same moment, and see their ends whatever happens to signal handlers."""

import subprocess
import sys
import threading

import uvloop

from peers.child_process import ended, spawn

LOOPS, EACH = 4, 8


def test_loops_in_several_threads_start_processes_at_once() -> None:
    num_ended: list[int] = []
    errors: list[BaseException] = []
    together = threading.Barrier(LOOPS)

    async def start_some() -> None:
        together.wait()
        for _ in range(EACH):
            child = await spawn("true")
            await ended(child)  # not `child.wait`: another test's library may have taken SIGCHLD from this process
            num_ended.append(1)

    def work() -> None:
        try:
            uvloop.run(start_some())
        except RuntimeError as error:  # uvloop's, when loops race
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(LOOPS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sum(num_ended) == LOOPS * EACH


WAIT_WITHOUT_SIGCHLD = """
import asyncio, os, signal, uvloop
from peers.child_process import ended, spawn

async def main():
    child = await spawn("sleep", "60")
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # as Lightning's teardown does
    async with asyncio.timeout(0.6):
        try:
            await ended(child)
        finally:
            child.terminate()
    raise SystemExit("a child that lives has not ended")

async def rest():
    try:
        await main()
    except TimeoutError:
        pass
    child = await spawn("true")
    await ended(child)
    try:
        os.waitpid(child.pid, 0)
    except ChildProcessError:
        print("ended, and no zombie")

uvloop.run(rest())
"""


def test_the_end_of_a_child_is_seen_though_its_signal_is_lost() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WAIT_WITHOUT_SIGCHLD], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.stdout.strip(), done.returncode) == ("ended, and no zombie", 0), done.stderr
