"""Training on one span: forward, backward, commit, and optimizer steps that never change weights under an open graph.

Runs on the event loop and hands torch work to the compute thread; knows nothing of networks. The rules are in
`ledger.py`, the arithmetic in `compute.py` and `optimizer.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import torch

from blocks.adapters import parameters_by_unit
from blocks.compute import SpanCompute, Stash
from blocks.errors import BadSession
from blocks.ledger import Ledger, MicrobatchId
from blocks.optimizer import OptimizerConfig, UnitOptimizer, add_gradients, divided
from blocks.spans import Span, UnitId, unit_of
from blocks.worker import ComputeThread, Priority

logger = logging.getLogger(__name__)

UnitGradients = dict[UnitId, dict[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingLimits:
    """How long and how much a host keeps for others.

    `open_seconds`: from a forward to its backward; `pending_seconds`: from a backward to its commit;
    `drain_seconds`: how long a step or a round waits for open stashes before it drops them.
    """

    open_seconds: float = 120.0
    pending_seconds: float = 120.0
    drain_seconds: float = 20.0
    stash_bytes: int = 2 << 30
    max_open: int = 256

    def __post_init__(self) -> None:
        if min(self.open_seconds, self.pending_seconds, self.drain_seconds) <= 0 or self.max_open < 1:
            raise ValueError("training limits must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class Microbatch:
    """One forward request: `hidden_BTD` enters block `span.start`; `mask_BT` is 1 where there is a token."""

    id: MicrobatchId
    span: Span
    samples: int
    hidden_BTD: torch.Tensor
    mask_BT: torch.Tensor | None


def dropout_seed(run_seed: int, microbatch: MicrobatchId) -> int:
    """The seed of a microbatch's dropout: the same wherever and however often it is computed."""
    return int.from_bytes(hashlib.sha256(f"{run_seed}|{microbatch}".encode()).digest()[:8], "big") >> 1


class SpanTrainer:
    """The training half of a host. Start `run()` in a task group; it makes the steps that commits call for."""

    def __init__(
        self,
        compute: SpanCompute,
        thread: ComputeThread,
        ledger: Ledger,
        optimizer: OptimizerConfig,
        limits: TrainingLimits,
        clock: Callable[[], float],
    ) -> None:
        self.ledger = ledger
        self.steps = 0
        self.dropped = 0
        self._compute, self._thread, self._limits, self._clock = compute, thread, limits, clock
        self._adapter = compute.settings.name
        self._seed = compute.settings.seed
        self._optimizers = {
            unit: UnitOptimizer(parameters, optimizer) for unit, parameters in parameters_by_unit(compute.model).items()
        }
        self._stashes: dict[MicrobatchId, Stash] = {}
        self._pending: dict[MicrobatchId, UnitGradients] = {}
        self._sums: dict[UnitId, dict[str, torch.Tensor] | None] = dict.fromkeys(self._optimizers)
        self._admitting = asyncio.Event()
        self._admitting.set()
        self._changed = asyncio.Event()
        self._due = asyncio.Event()
        self._mutating = asyncio.Lock()
        self._swarm_samples: dict[int, int] = {}

    async def forward(self, microbatch: Microbatch) -> torch.Tensor:
        """Compute the span, keep what the backward pass needs; returns [B, T, D] in the input's dtype.

        Raises:
            BadSession: too many microbatches are open, or this one was dropped while it waited.
        """
        await self._admitting.wait()
        if len(self.ledger.open_ids()) >= self._limits.max_open:
            raise BadSession(f"{self._limits.max_open} microbatches are open here; commit or drop some, or try later")
        self._forget(microbatch.id)
        deadline = self._clock() + self._limits.open_seconds
        self.ledger.open(microbatch.id, microbatch.span, samples=microbatch.samples, deadline=deadline)
        keep_graph = sum(s.num_bytes for s in self._stashes.values()) < self._limits.stash_bytes
        seed = dropout_seed(self._seed, microbatch.id)
        try:
            output, stash = await self._thread.run(
                Priority.FORWARD,
                lambda: self._compute.forward_train(
                    microbatch.hidden_BTD,
                    span=microbatch.span,
                    mask_BT=microbatch.mask_BT,
                    seed=seed,
                    keep_graph=keep_graph,
                ),
            )
        except BaseException:
            self._forget(microbatch.id)
            raise
        if not self.ledger.is_open(microbatch.id):
            raise BadSession("the microbatch was dropped: an optimizer step could not wait longer; send it again")
        self._stashes[microbatch.id] = stash
        return output

    async def backward(self, microbatch: MicrobatchId, grad_BTD: torch.Tensor, *, tokens: int) -> torch.Tensor:
        """The gradient with respect to the span's input; the adapter's own gradient stays here, pending.

        Raises:
            BadSession: no such microbatch is open here.
        """
        stash = self._stashes.pop(microbatch, None)
        if stash is None:
            raise BadSession("no such microbatch is open here (dropped, or never sent); send its forward again")
        try:
            grad_input, gradients = await self._thread.run(
                Priority.BACKWARD, lambda: self._compute.backward(stash, grad_BTD)
            )
        except BaseException:
            self._forget(microbatch)
            raise
        if not self.ledger.is_open(microbatch):
            raise BadSession("the microbatch was dropped: an optimizer step could not wait longer; send it again")
        self.ledger.answer(microbatch, tokens=tokens, deadline=self._clock() + self._limits.pending_seconds)
        self._pending[microbatch] = gradients
        self._changed.set()
        return grad_input

    async def commit(self, microbatch: MicrobatchId) -> None:
        """Count a microbatch, once. Repeating a commit is harmless.

        Raises:
            BadSession: it is neither pending nor counted here.
        """
        if not self.ledger.is_pending(microbatch):
            if self.ledger.is_counted(microbatch):
                return
            raise BadSession("no such microbatch is pending here (dropped, or never answered); send it again")
        fresh = self.ledger.commit(microbatch)
        gradients = self._pending.pop(microbatch)
        for block in sorted(fresh):
            unit = unit_of(self._adapter, block)
            self._sums[unit] = add_gradients(self._sums[unit], gradients[unit])
        if self.ledger.due():
            self._admitting.clear()
            self._due.set()

    def drop(self, microbatch: MicrobatchId) -> None:
        """The trainer gave a microbatch up."""
        self._forget(microbatch)

    def drop_life(self, trainer: str, life: int) -> None:
        """A trainer's stream closed: nothing of it that is not committed will be."""
        for microbatch in self.ledger.of_trainer(trainer, life):
            self._forget(microbatch)

    async def evaluate(
        self, hidden_BTD: torch.Tensor, mask: torch.Tensor | None, span: Span, label: str
    ) -> torch.Tensor:
        """A forward pass with snapshot `label`, without gradient or dropout; [B, T, D]."""
        return await self._thread.run(
            Priority.EVALUATE,
            lambda: self._compute.forward_eval(hidden_BTD, span=span, mask_BT=mask, version=label),
        )

    async def run(self, *, sweep_seconds: float = 1.0) -> None:
        """Make the steps that are due and drop what is overdue, until cancelled."""
        while True:
            try:
                await asyncio.wait_for(self._due.wait(), timeout=sweep_seconds)
            except TimeoutError:
                self._sweep()
                continue
            self._due.clear()
            async with self.frozen(), self.drained():
                await self._thread.run(Priority.STEP, self._step_due)

    @asynccontextmanager
    async def frozen(self) -> AsyncIterator[None]:
        """No parameter changes inside, except in a `drained` block; forwards, backwards and commits go on."""
        async with self._mutating:
            yield

    @asynccontextmanager
    async def drained(self) -> AsyncIterator[None]:
        """Inside `frozen`: new forwards wait and no graph is open, so that parameters may change.

        Open stashes drain from the end of a chain to its start, because the last hosts need nothing from others; the
        late are dropped.
        """
        self._admitting.clear()
        try:
            await self._drain()
            yield
        finally:
            if self.ledger.due():
                self._due.set()
            else:
                self._admitting.set()

    def note_swarm_samples(self, samples_by_block: Mapping[int, int]) -> None:
        """Samples that the whole swarm has counted per block, from its records: the clock of the schedule."""
        self._swarm_samples = dict(samples_by_block)

    def read_moments(self) -> dict[UnitId, dict[str, torch.Tensor]]:
        """Optimizer state by unit (see UnitOptimizer.read). Call in the compute thread."""
        return {unit: optimizer.read() for unit, optimizer in self._optimizers.items()}

    def write_moments(self, moments: Mapping[UnitId, Mapping[str, torch.Tensor]]) -> None:
        """Take optimizer state for some units. Call in the compute thread."""
        for unit, state in moments.items():
            self._optimizers[unit].write(state)

    def _step_due(self) -> None:
        for block in self.ledger.due():
            unit = unit_of(self._adapter, block)
            total, self._sums[unit] = self._sums[unit], None
            before = self.ledger.tallies[block].total_samples - self.ledger.tallies[block].samples
            closed = self.ledger.stepped(block)
            if total is not None and closed.tokens > 0:
                samples = max(before, self._swarm_samples.get(block, 0) - closed.samples)
                self._optimizers[unit].step(divided(total, closed.tokens), samples=samples)
        self.steps += 1

    async def _drain(self) -> None:
        deadline = self._clock() + self._limits.drain_seconds
        while self.ledger.open_ids():
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), timeout=max(0.0, deadline - self._clock()))
            except TimeoutError:
                late = self.ledger.open_ids()
                logger.warning("dropped late microbatches count=%d waited=%.0fs", len(late), self._limits.drain_seconds)
                for microbatch in late:
                    self._forget(microbatch)

    def _sweep(self) -> None:
        for microbatch in self.ledger.overdue(self._clock()):
            logger.warning("dropped overdue microbatch trainer=%s step=%d", microbatch.trainer, microbatch.step)
            self._forget(microbatch)

    def _forget(self, microbatch: MicrobatchId) -> None:
        self._stashes.pop(microbatch, None)
        self._pending.pop(microbatch, None)
        if self.ledger.drop(microbatch):
            self.dropped += 1
        self._changed.set()
