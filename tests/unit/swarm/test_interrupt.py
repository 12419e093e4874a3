"""Work that waits for the network ends when another thread says so."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from swarm.interrupt import Interrupt, Interrupted
from swarm.loop import LoopThread


@pytest.fixture
def network() -> Iterator[LoopThread]:
    loop = LoopThread()
    yield loop
    loop.close()


async def after_a_moment() -> int:
    await asyncio.sleep(0)
    return 7


def test_work_that_nobody_ends_gives_its_result(network: LoopThread) -> None:
    interrupt = Interrupt()
    assert [interrupt.wait(after_a_moment(), network.loop) for _ in range(3)] == [7, 7, 7]
    assert not interrupt.is_set


def test_waiting_ends_at_once_and_the_work_is_cancelled(network: LoopThread) -> None:
    interrupt, began, ended = Interrupt(), threading.Event(), threading.Event()

    async def for_ever() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    def end_it() -> None:
        assert began.wait(30)
        interrupt.set()

    other = threading.Thread(target=end_it)
    other.start()
    with pytest.raises(Interrupted):
        interrupt.wait(for_ever(), network.loop)
    other.join()
    assert ended.wait(30)


def test_what_is_ended_before_never_begins(network: LoopThread) -> None:
    interrupt, ran = Interrupt(), []

    async def work() -> None:
        ran.append(1)

    interrupt.set()
    interrupt.set()
    with pytest.raises(Interrupted):
        interrupt.wait(work(), network.loop)
    network.run(after_a_moment())
    assert not ran


def test_errors_of_the_work_come_through(network: LoopThread) -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Interrupt().wait(fail(), network.loop)
