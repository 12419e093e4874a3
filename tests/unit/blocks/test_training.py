"""A host's training: the same numbers as plain torch, counted once, and no weight changed under an open graph."""

from __future__ import annotations

import asyncio

import pytest
import torch

from blocks.errors import BadGradient, BadSession, Busy
from blocks.source import ModelSource
from blocks.spans import Span
from blocks.training.span_trainer import Microbatch
from blocks.worker import ComputeThread, Priority
from tests.errors_page import met
from tests.unit.blocks.trainers import (
    loss_grad,
    new_trainer,
    pass_through,
    plain_training,
    running,
    sums_of,
    until,
    work,
)


@pytest.mark.parametrize("stash_bytes", [1 << 30, 0], ids=["graphs kept", "computed again"])
async def test_training_is_plain_torch_training(
    llama_source: ModelSource, thread: ComputeThread, stash_bytes: int
) -> None:
    want, want_grads = plain_training(llama_source, 3)
    trainer = new_trainer(llama_source, thread, stash_bytes=stash_bytes)
    grads = []
    async with running(trainer):
        for step in range(3):
            pair = [work(step, 0), work(step, 1)]
            outputs = [await trainer.forward(one) for one in pair]
            for one, output in zip(pair, outputs, strict=True):
                grads.append(await trainer.backward(one.piece, loss_grad(output), tokens=10))
            for one in pair:
                await trainer.commit(one.piece)
                await trainer.commit(one.piece)
            await until(lambda done=step + 1: trainer.steps == done)
    got = sums_of(trainer)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-5)
    for got_grad, want_grad in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got_grad, want_grad, rtol=1e-4, atol=1e-5)
    assert trainer.ledger.tallies[2].total_samples == 12
    assert trainer.dropped == 0


async def test_recomputing_with_dropout_gives_the_gradients_of_the_kept_graph(
    llama_source: ModelSource, thread: ComputeThread
) -> None:
    kept = new_trainer(llama_source, thread, dropout=0.3)
    again = new_trainer(llama_source, thread, dropout=0.3, stash_bytes=0)
    for step in range(2):  # the adapter's B is zero at first, and so would be the difference
        one = work(step)
        assert torch.equal(await pass_through(kept, one), await pass_through(again, one))


async def test_a_commit_of_what_was_never_answered_is_refused(llama_source: ModelSource, thread: ComputeThread) -> None:
    trainer = new_trainer(llama_source, thread)
    one = work(0)
    with pytest.raises(BadSession, match="never"):
        await trainer.commit(one.piece)
    with pytest.raises(BadSession, match="never sent"):
        await trainer.backward(one.piece, one.hidden_BTD, tokens=1)
    await trainer.forward(one)
    with pytest.raises(BadSession, match="send it again"):
        await trainer.commit(one.piece)
    trainer.drop(one.id)
    with pytest.raises(BadSession):
        await trainer.backward(one.piece, one.hidden_BTD, tokens=1)
    assert trainer.dropped == 1


async def test_a_repeated_microbatch_counts_once(llama_source: ModelSource, thread: ComputeThread) -> None:
    trainer = new_trainer(llama_source, thread, batch_size=100)
    one = work(0)
    for _ in range(3):
        await pass_through(trainer, one)
        await trainer.commit(one.piece)
    assert trainer.ledger.tallies[2].samples == 2


async def test_two_pieces_of_one_microbatch_are_both_learnt_from(
    llama_source: ModelSource, thread: ComputeThread
) -> None:
    whole, parts = (new_trainer(llama_source, thread) for _ in range(2))
    one = work(0, rows=4)
    first, second = work(0, rows=4, span=Span(2, 3)), work(0, rows=4, span=Span(3, 4))
    async with running(whole), running(parts):
        await pass_through(whole, one)
        await whole.commit(one.piece)
        middle = await parts.forward(first)
        second = Microbatch(id=one.id, span=second.span, samples=4, hidden_BTD=middle, mask_BT=None)
        grad = await pass_through(parts, second)
        await parts.backward(first.piece, grad, tokens=10)
        await parts.commit(first.piece)
        await parts.commit(second.piece)
        await until(lambda: whole.steps == 1 and not parts.ledger.due() and parts.steps >= 1)
        await thread.run(Priority.CLOSE, lambda: None)  # behind every step that was handed in
    for name, tensor in sums_of(whole).items():
        torch.testing.assert_close(sums_of(parts)[name], tensor, rtol=0, atol=1e-4)


async def test_two_trainers_at_once_never_lock_each_other_out(llama_source: ModelSource, thread: ComputeThread) -> None:
    trainer = new_trainer(llama_source, thread, drain_seconds=5.0)

    async def train(name: str) -> None:
        for step in range(8):
            pair = [work(step, index, trainer=name) for index in range(2)]
            await asyncio.gather(*(pass_through(trainer, one) for one in pair))
            for one in pair:
                await trainer.commit(one.piece)

    async with running(trainer), asyncio.TaskGroup() as tasks:
        tasks.create_task(train("ann"))
        tasks.create_task(train("bob"))
    assert trainer.dropped == 0
    assert trainer.ledger.tallies[3].total_samples == 64


async def test_memory_for_others_is_bounded(llama_source: ModelSource, thread: ComputeThread) -> None:
    crowded = new_trainer(llama_source, thread, max_open=2)
    await crowded.forward(work(0))
    await crowded.forward(work(1))
    with pytest.raises(Busy) as caught:
        await crowded.forward(work(2))
    met("microbatches (… MiB) are held", caught.value)
    greedy = new_trainer(llama_source, thread, held_bytes=10_000)

    async def never_commit() -> None:
        for step in range(50):
            await pass_through(greedy, work(step))

    with pytest.raises(Busy):
        await never_commit()
    assert len(greedy.ledger.pieces()) < 10


async def test_a_cancelled_old_forward_leaves_the_repeated_one_alone(
    llama_source: ModelSource, thread: ComputeThread
) -> None:
    trainer = new_trainer(llama_source, thread)
    old = asyncio.create_task(trainer.forward(work(0)))
    await asyncio.sleep(0)
    new = asyncio.create_task(trainer.forward(work(0)))
    await asyncio.sleep(0)
    old.cancel()
    output = await new
    await trainer.backward(work(0).piece, loss_grad(output), tokens=10)
    await trainer.commit(work(0).piece)
    assert old.cancelled()


async def test_a_gradient_that_overflows_is_refused_and_dropped(
    llama_source: ModelSource, thread: ComputeThread
) -> None:
    trainer = new_trainer(llama_source, thread)
    output = await trainer.forward(work(0))
    with pytest.raises(BadGradient) as caught:
        await trainer.backward(work(0).piece, torch.full_like(output, 3e38), tokens=10)
    met("this microbatch overflowed", caught.value)
    assert not trainer.ledger.pieces()
    await trainer.forward(work(1))
    with pytest.raises(BadSession):
        await trainer.backward(work(1).piece, torch.zeros(1, 1, 64), tokens=1)
    assert not trainer.ledger.pieces()
