"""The compute thread: order, errors, cancelling, and its end."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator

import pytest

from blocks.worker import ComputeThread, Priority


@pytest.fixture
def thread() -> Iterator[ComputeThread]:
    thread = ComputeThread()
    yield thread
    thread.close()


def test_jobs_go_by_priority_then_by_arrival(thread: ComputeThread) -> None:
    go, order = threading.Event(), []
    thread.submit(Priority.DECODE, lambda: go.wait(30))
    wanted = [(Priority.FORWARD, 1), (Priority.DECODE, 2), (Priority.STEP, 3), (Priority.FORWARD, 4)]
    jobs = [thread.submit(priority, lambda number=number: order.append(number)) for priority, number in wanted]
    go.set()
    for job in jobs:
        job.result(timeout=30)
    assert order == [2, 3, 1, 4]


def test_an_error_goes_to_who_waits_and_the_thread_goes_on(thread: ComputeThread) -> None:
    with pytest.raises(ZeroDivisionError):
        thread.submit(Priority.STEP, lambda: 1 // 0).result(timeout=30)
    assert thread.submit(Priority.STEP, lambda: 5).result(timeout=30) == 5


async def test_a_cancelled_job_that_has_not_begun_never_runs(thread: ComputeThread) -> None:
    go, ran = threading.Event(), []
    thread.submit(Priority.DECODE, lambda: go.wait(30))
    task = asyncio.create_task(thread.run(Priority.STEP, lambda: ran.append(1)))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    go.set()
    await thread.run(Priority.EVALUATE, lambda: None)
    assert ran == []


def test_closing_finishes_what_is_queued_and_refuses_more() -> None:
    thread, ran = ComputeThread(), []
    jobs = [thread.submit(Priority.EVALUATE, lambda number=number: ran.append(number)) for number in range(5)]
    thread.close()
    thread.close()
    assert ran == [0, 1, 2, 3, 4]
    assert all(job.done() for job in jobs)
    with pytest.raises(RuntimeError, match="closed"):
        thread.submit(Priority.STEP, lambda: None)


def test_what_a_finished_job_held_is_let_go(thread: ComputeThread) -> None:
    class Graph:
        pass

    graph = Graph()
    seen = weakref.ref(graph)
    thread.submit(Priority.STEP, lambda held=graph: None).result(timeout=30)
    del graph
    thread.submit(Priority.STEP, lambda: None).result(timeout=30)
    gc.collect()
    assert seen() is None
