"""The loop in a thread of its own."""

from __future__ import annotations

import asyncio
import threading

import pytest

from swarm.loop import LoopThread


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
    with pytest.raises(RuntimeError, match="closed"):
        loop.run(start())
