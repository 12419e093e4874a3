"""When a host steps: deadlines, drains, and what happens to work that is open while weights change."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
import torch

from blocks.adapters import read_units
from blocks.errors import BadSession
from blocks.source import ModelSource
from blocks.worker import ComputeThread, Priority
from tests.unit.blocks.trainers import loss_grad, new_trainer, pass_through, running, sums_of, until, work


async def test_the_uncommitted_are_dropped_at_their_deadline(llama_source: ModelSource, thread: ComputeThread) -> None:
    now = [0.0]
    trainer = new_trainer(llama_source, thread, clock=lambda: now[0])
    async with running(trainer, sweep_seconds=0.01):
        await pass_through(trainer, work(0))
        await trainer.forward(work(1))
        now[0] = 119.0
        await pass_through(trainer, work(2))
        now[0] = 120.0
        await until(lambda: trainer.dropped == 2)
        await trainer.commit(work(2).piece)
        for step in (0, 1):
            with pytest.raises(BadSession):
                await trainer.commit(work(step).piece)


async def test_the_overdue_are_dropped_even_while_steps_follow_each_other(
    llama_source: ModelSource, thread: ComputeThread
) -> None:
    now = [0.0]
    trainer = new_trainer(llama_source, thread, batch_size=2, clock=lambda: now[0])
    async with running(trainer, sweep_seconds=60.0):
        await pass_through(trainer, work(0))
        now[0] = 120.0
        for step in range(1, 10_000):
            await pass_through(trainer, work(step))
            await trainer.commit(work(step).piece)
            if trainer.dropped:
                break
    assert trainer.dropped == 1


async def test_a_step_waits_for_an_open_microbatch(llama_source: ModelSource, thread: ComputeThread) -> None:
    trainer = new_trainer(llama_source, thread, drain_seconds=20.0)
    before = sums_of(trainer)
    async with running(trainer):
        output = await trainer.forward(work(9))
        for step in range(2):
            await pass_through(trainer, work(step))
        for step in range(2):
            await trainer.commit(work(step).piece)
        waiting = asyncio.create_task(trainer.forward(work(8)))
        await asyncio.sleep(0)
        assert all(torch.equal(before[name], tensor) for name, tensor in sums_of(trainer).items())
        assert trainer.steps == 0
        assert not waiting.done()
        await trainer.backward(work(9).piece, loss_grad(output), tokens=10)
        await waiting
        assert trainer.steps == 1
        assert trainer.dropped == 0
        await trainer.commit(work(9).piece)


async def test_a_step_drops_the_late(llama_source: ModelSource, thread: ComputeThread) -> None:
    trainer = new_trainer(llama_source, thread, drain_seconds=0.05)
    async with running(trainer):
        output = await trainer.forward(work(9))
        for step in range(2):
            await pass_through(trainer, work(step))
        for step in range(2):
            await trainer.commit(work(step).piece)
        await trainer.forward(work(8))
        assert (trainer.steps, trainer.dropped) == (1, 1)
        with pytest.raises(BadSession, match="send its forward again"):
            await trainer.backward(work(9).piece, loss_grad(output), tokens=10)


async def test_a_backward_that_comes_to_its_turn_after_the_step_is_refused_not_failed(
    llama_source: ModelSource, thread: ComputeThread
) -> None:
    trainer = new_trainer(llama_source, thread)
    output = await trainer.forward(work(0))
    asked = asyncio.create_task(trainer.backward(work(0).piece, loss_grad(output), tokens=10))
    await asyncio.sleep(0)
    trainer.drop(work(0).id)
    with pytest.raises(BadSession, match="dropped"):
        await asked


async def test_forwards_wait_while_drained_and_go_on_after(llama_source: ModelSource, thread: ComputeThread) -> None:
    trainer = new_trainer(llama_source, thread)
    async with asyncio.timeout(30):
        async with trainer.frozen(), trainer.drained():
            waiting = [asyncio.create_task(trainer.forward(work(step))) for step in range(3)]
            await thread.run(Priority.EVALUATE, lambda: None)
            assert not any(task.done() for task in waiting)
            assert trainer.ledger.open_pieces() == []
        await asyncio.gather(*waiting)


async def test_training_goes_on_while_a_round_keeps_the_weights_frozen(
    llama_source: ModelSource, thread: ComputeThread
) -> None:
    trainer = new_trainer(llama_source, thread)
    async with running(trainer):
        async with trainer.frozen():
            before = await thread.run(Priority.STEP, lambda: read_units(trainer._compute.model))
            for step in range(6):
                await pass_through(trainer, work(step))
                await trainer.commit(work(step).piece)
            after = await thread.run(Priority.STEP, lambda: read_units(trainer._compute.model))
            assert trainer.steps == 0
            assert all(torch.equal(before[u][n], after[u][n]) for u in before for n in before[u])
        await until(lambda: trainer.steps == 1)
        await pass_through(trainer, work(7))


async def test_commits_during_a_step_lose_neither_samples_nor_tokens(
    llama_source: ModelSource, thread: ComputeThread
) -> None:
    trainer = new_trainer(llama_source, thread, batch_size=2)
    async with running(trainer):
        for step in range(12):
            await pass_through(trainer, work(step))
        async with asyncio.TaskGroup() as tasks:
            for step in range(12):
                tasks.create_task(trainer.commit(work(step).piece))
        await until(lambda: not trainer.ledger.due())
    await thread.run(Priority.CLOSE, lambda: None)  # behind every step that was handed in
    assert trainer.ledger.tallies[2].total_samples == 24
    assert trainer.ledger.tallies[2].tokens == 0
    assert all(total is None for total in trainer.unit_steps._sums.values())


async def test_a_cancelled_commit_is_counted_all_the_same(llama_source: ModelSource, thread: ComputeThread) -> None:
    trainer = new_trainer(llama_source, thread, batch_size=100)
    await pass_through(trainer, work(0))
    task = asyncio.create_task(trainer.commit(work(0).piece))
    await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await thread.run(Priority.EVALUATE, lambda: None)
    assert trainer.ledger.tallies[2].samples == 2
    assert all(total is not None for total in trainer.unit_steps._sums.values())


async def test_a_step_can_be_made_on_less_than_a_batch_and_on_nothing_it_is_not(
    llama_source: ModelSource, thread: ComputeThread
) -> None:
    trainer = new_trainer(llama_source, thread, batch_size=100)
    async with running(trainer):
        await pass_through(trainer, work(0))
        await trainer.commit(work(0).piece)
        before = read_units(trainer._compute.model)
        async with trainer.frozen(), trainer.drained():
            await trainer.step_early([3])
            await trainer.step_early([3])
        after = read_units(trainer._compute.model)
    assert trainer.steps == 1, "once, as the second time there was nothing"
    assert trainer.ledger.tallies[3].since_round.steps == 1
    assert trainer.ledger.tallies[3].samples == 0
    assert trainer.ledger.tallies[2].samples == 2, "the other block's is still to come"
    same = {unit: all(torch.equal(before[unit][n], after[unit][n]) for n in before[unit]) for unit in before}
    assert same == {"default/block.2": True, "default/block.3": False}
