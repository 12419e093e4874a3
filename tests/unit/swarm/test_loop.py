"""The loop in a thread of its own."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest

from swarm.errors import BadConfig
from swarm.loop import LEFT, LoopThread


def test_work_runs_in_the_thread_and_its_errors_come_back() -> None:
    loop = LoopThread("here")

    async def name() -> str:
        return threading.current_thread().name

    async def fail() -> None:
        raise KeyError("x")

    assert loop.run(name()) == "here"
    with pytest.raises(KeyError):
        loop.run(fail())
    loop.close()
    loop.close()


def test_closing_cancels_what_runs_and_refuses_more() -> None:
    loop, ended = LoopThread(), []

    async def wait(begun: asyncio.Event) -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def start() -> asyncio.Task[None]:
        begun = asyncio.Event()
        task = asyncio.create_task(wait(begun))
        await begun.wait()
        return task

    task = loop.run(start())
    loop.close()
    assert ended == [True]
    assert task.cancelled()
    with pytest.raises(BadConfig, match=LEFT):
        loop.run(start())


@pytest.mark.parametrize(("others", "told"), [(False, 0), (True, 1)])
def test_tasks_that_a_search_of_the_directory_leaves_behind_are_no_news(
    others: bool, told: int, caplog: pytest.LogCaptureFixture
) -> None:
    gc.collect()  # what other tests left behind is news of theirs
    caplog.clear()
    loop = LoopThread()

    async def forever() -> None:
        await asyncio.get_running_loop().create_future()

    async def leave_behind() -> None:
        task = asyncio.create_task(forever() if others else asyncio.Event().wait())
        await asyncio.sleep(0)
        del task
        gc.collect()

    loop.run(leave_behind())
    loop.close()
    assert len([record for record in caplog.records if "was destroyed" in record.getMessage()]) == told
