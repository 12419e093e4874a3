"""A host's training: the same numbers as plain torch, counted once, and no weight changed under an open graph."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import torch
from torch import Tensor

from blocks.adapters import LoraSettings, attach, parameters_by_unit, read_units
from blocks.compute import SpanCompute
from blocks.errors import BadGradient, BadSession, Busy
from blocks.ledger import Ledger, MicrobatchId
from blocks.load import load_span
from blocks.open_work import TrainingLimits
from blocks.optimizer import OptimizerConfig
from blocks.source import ModelSource
from blocks.spans import Span
from blocks.training import Microbatch, SpanTrainer
from blocks.worker import ComputeThread, Priority

HELD = Span(2, 4)
SETTINGS = LoraSettings(seed=5, rank=4)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, clip_norm=1.0, weight_decay=0.01)


@pytest.fixture
def thread() -> Iterator[ComputeThread]:
    thread = ComputeThread(num_threads=1)
    yield thread
    thread.close()


def new_trainer(
    source: ModelSource,
    thread: ComputeThread,
    *,
    batch_size: int = 4,
    dropout: float = 0.0,
    clock: Callable[[], float] = time.monotonic,
    **limits: float,
) -> SpanTrainer:
    model = load_span(source, HELD, dtype=torch.float32, device=torch.device("cpu"))
    settings = LoraSettings(seed=5, rank=4, dropout=dropout)
    return SpanTrainer(
        SpanCompute(model, settings),
        thread,
        Ledger(HELD, batch_size=batch_size),
        OPTIMIZER,
        TrainingLimits(**limits),  # type: ignore[arg-type]
        clock,
    )


@contextlib.asynccontextmanager
async def running(trainer: SpanTrainer, *, sweep_seconds: float = 0.02) -> AsyncIterator[None]:
    task = asyncio.create_task(trainer.run(sweep_seconds=sweep_seconds))
    try:
        async with asyncio.timeout(10):
            yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def work(step: int, index: int = 0, *, trainer: str = "ann", span: Span = HELD, rows: int = 2) -> Microbatch:
    rng = torch.Generator().manual_seed(10 * step + index)
    hidden_BTD = torch.randn(rows, 5, 64, generator=rng)
    id_ = MicrobatchId(trainer, 1, step, index)
    return Microbatch(id=id_, span=span, samples=rows, hidden_BTD=hidden_BTD, mask_BT=None)


def loss_grad(output_BTD: Tensor) -> Tensor:
    return (output_BTD - 0.1) * 2


async def pass_through(trainer: SpanTrainer, one: Microbatch, *, tokens: int = 10) -> Tensor:
    output = await trainer.forward(one)
    return await trainer.backward(one.piece, loss_grad(output), tokens=tokens)


async def until(condition: object) -> None:
    """Let the loop run until `condition()` holds; the test's own deadline ends what never comes."""
    while not condition():  # type: ignore[operator]  # noqa: ASYNC110 - a turn of the loop, not a nap
        await asyncio.sleep(0)


def sums_of(trainer: SpanTrainer) -> dict[str, Tensor]:
    """Copies of what is trained."""
    named = parameters_by_unit(trainer._compute.model).items()
    return {f"{unit}/{name}": p.detach().clone() for unit, each in named for name, p in each.items()}


def plain_training(source: ModelSource, steps: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The same work with one AdamW per unit of torch and one whole graph a step."""
    model = load_span(source, HELD, dtype=torch.float32, device=torch.device("cpu"))
    attach(model, SETTINGS)
    units = parameters_by_unit(model)
    adamws = {unit: torch.optim.AdamW(named.values(), lr=1e-2, weight_decay=0.01) for unit, named in units.items()}
    input_grads = []
    for step in range(steps):
        loss = torch.zeros(())
        inputs = []
        for index in range(2):
            hidden = work(step, index).hidden_BTD.requires_grad_(True)
            loss = loss + ((model.forward(hidden, span=HELD) - 0.1) ** 2).sum()
            inputs.append(hidden)
        loss.backward()
        input_grads += [hidden.grad for hidden in inputs]
        for unit, adamw in adamws.items():
            for parameter in units[unit].values():
                assert parameter.grad is not None
                parameter.grad /= 20
            torch.nn.utils.clip_grad_norm_(units[unit].values(), 1.0)
            adamw.step()
            adamw.zero_grad()
    final = {f"{unit}/{name}": p.detach().clone() for unit, named in units.items() for name, p in named.items()}
    return final, input_grads


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
    async with asyncio.timeout(10):
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
    assert all(total is None for total in trainer._units._sums.values())


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
    assert all(total is not None for total in trainer._units._sums.values())


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
    with pytest.raises(Busy, match="try later"):
        await crowded.forward(work(2))
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
    with pytest.raises(BadGradient):
        await trainer.backward(work(0).piece, torch.full_like(output, 3e38), tokens=10)
    assert not trainer.ledger.pieces()
    await trainer.forward(work(1))
    with pytest.raises(BadSession):
        await trainer.backward(work(1).piece, torch.zeros(1, 1, 64), tokens=1)
    assert not trainer.ledger.pieces()
