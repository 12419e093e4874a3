"""Trainers of a tiny span, and what plain torch makes of the same work: shared by the tests of training."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

import torch
from torch import Tensor

from blocks.adapters import LoraSettings, attach, parameters_by_unit
from blocks.compute import SpanCompute
from blocks.load import load_span
from blocks.source import ModelSource
from blocks.spans import Span
from blocks.training.ledger import Ledger, MicrobatchId
from blocks.training.open_work import TrainingLimits
from blocks.training.optimizer import OptimizerConfig
from blocks.training.span_trainer import Microbatch, SpanTrainer
from blocks.worker import ComputeThread

HELD = Span(2, 4)
SETTINGS = LoraSettings(seed=5, rank=4)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, clip_norm=1.0, weight_decay=0.01)


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
        async with asyncio.timeout(30):
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
