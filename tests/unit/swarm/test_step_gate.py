"""Who may touch the parameters of somebody else's loop, and who waits for whom."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from swarm.own_loops.step_gate import Stance, StepGate

SECONDS = 30.0


def in_thread(work: Callable[[], None]) -> Future[None]:
    return ThreadPoolExecutor(1).submit(work)


async def is_done(future: Future[None]) -> None:
    async with asyncio.timeout(SECONDS):
        await asyncio.wrap_future(future)


async def passed(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, SECONDS)


async def test_nobody_waits_at_a_gate_that_is_free() -> None:
    gate = StepGate()
    async with asyncio.timeout(SECONDS), gate.visit(Stance.READING), gate.visit(Stance.FREE):
        pass
    gate.train()


@pytest.mark.parametrize("needs", [Stance.READING, Stance.FREE])
async def test_a_visit_waits_for_a_boundary_and_the_loop_for_the_visit(needs: Stance) -> None:
    gate = StepGate()
    gate.train()
    order: list[str] = []
    asked = asyncio.Event()

    async def visit() -> None:
        asked.set()
        async with gate.visit(needs):
            order.append("in")
            async with gate.visit(Stance.FREE):  # at a boundary the inner one is let in at once
                order.append("inner")
            await asyncio.to_thread(loop_is_there.wait, SECONDS)
            order.append("out")

    loop_is_there = threading.Event()

    def loop() -> None:
        loop_is_there.set()
        gate.train()
        order.append("training")

    visiting = asyncio.create_task(visit())
    await asked.wait()
    await asyncio.sleep(0)
    assert not order
    await is_done(in_thread(loop))
    await asyncio.wait_for(visiting, SECONDS)
    assert order == ["in", "inner", "out", "training"]
    assert gate.stance == Stance.TRAINING


async def test_while_the_loop_evaluates_others_read_and_write_only_afterwards() -> None:
    gate = StepGate()
    gate.train()
    gate.read()
    writing = threading.Event()

    async def visit() -> None:
        async with gate.visit(Stance.READING):
            reading.set()
            async with gate.visit(Stance.FREE):
                writing.set()

    reading = asyncio.Event()
    visiting = asyncio.create_task(visit())
    async with asyncio.timeout(SECONDS):
        await reading.wait()
    await asyncio.sleep(0.01)
    assert not writing.is_set()
    await is_done(in_thread(gate.train))
    await asyncio.wait_for(visiting, SECONDS)
    assert writing.is_set()


async def test_a_visitor_who_gives_up_is_not_waited_for() -> None:
    gate = StepGate()
    gate.train()
    visiting = asyncio.create_task(gate.visit(Stance.READING).__aenter__())
    await asyncio.sleep(0)
    visiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await visiting
    await is_done(in_thread(gate.train))


async def test_an_evaluation_does_not_begin_while_somebody_writes() -> None:
    gate = StepGate()
    began = threading.Event()

    def evaluate() -> None:
        gate.read()
        began.set()

    async with gate.visit(Stance.FREE):
        evaluating = in_thread(evaluate)
        assert not await asyncio.to_thread(began.wait, 0.1)
    await is_done(evaluating)
    assert gate.stance == Stance.READING


async def test_the_loop_waits_for_what_it_is_told_to() -> None:
    gate, seen = StepGate(), []
    gate.train(lambda: len(seen) < 3 and not seen.append(1))
    assert len(seen) == 3


def test_a_loop_that_does_not_come_back_is_late_by_its_own_pace() -> None:
    now = [0.0]
    gate = StepGate(lambda: now[0])
    now[0] = 100.0
    assert not gate.is_late(), "it has not begun"
    gate.train()
    now[0] = 119.0
    assert not gate.is_late()
    now[0] = 121.0
    assert gate.is_late()
    gate.train()  # a step of 21 s
    now[0] = 121.0 + 4 * 21 - 1
    assert not gate.is_late()
    now[0] += 2
    assert gate.is_late()
    gate.rest()
    assert not gate.is_late(), "nobody waits for a loop that is at rest"
