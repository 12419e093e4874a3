"""Training on one span: forward, backward, commit, and optimizer steps that never change weights under an open graph.

Runs on the event loop and hands torch work to the compute thread; knows nothing of networks. The rules are in
`ledger.py`, the arithmetic in `compute.py` and `unit_steps.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import torch

from blocks.adapters import parameters_by_unit
from blocks.compute import SpanCompute, Stash, UnitGradients
from blocks.errors import BadGradient, BadSession
from blocks.spans import Span, UnitId, unit_of
from blocks.training.ledger import Ledger, MicrobatchId, Piece
from blocks.training.open_work import Kept, OpenWork, TrainingLimits
from blocks.training.optimizer import OptimizerConfig
from blocks.training.unit_steps import DueStep, UnitSteps
from blocks.worker import ComputeThread, Priority

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Microbatch:
    """One forward request: `hidden_BTD` enters block `span.start`; `mask_BT` is 1 where there is a token."""

    id: MicrobatchId
    span: Span
    samples: int
    hidden_BTD: torch.Tensor
    mask_BT: torch.Tensor | None

    @property
    def piece(self) -> Piece:
        """What the ledger calls it."""
        return Piece(self.id, self.span)


def dropout_seed(run_seed: int, microbatch: MicrobatchId) -> int:
    """The seed of a microbatch's dropout: the same wherever and however often it is computed."""
    return int.from_bytes(hashlib.sha256(f"{run_seed}|{microbatch}".encode()).digest()[:8], "big") >> 1


class SpanTrainer:
    """The training half of a host. Start `run()` in a task group; it makes the steps that commits call for.

    `unit_steps` belongs to the compute thread.
    """

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
        self._compute, self._thread, self._limits = compute, thread, limits
        self._work = OpenWork(ledger, limits, clock)
        self._adapter = compute.settings.name
        self._seed = compute.settings.seed
        self.unit_steps = UnitSteps(parameters_by_unit(compute.model), optimizer)
        self._admitting = asyncio.Event()
        self._admitting.set()
        self._due = asyncio.Event()
        self._mutating = asyncio.Lock()
        self._swarm_samples: dict[int, int] = {}

    async def forward(self, microbatch: Microbatch) -> torch.Tensor:
        """Compute the span, keep what the backward pass needs; returns [B, T, D] in the input's dtype.

        Raises:
            Busy: too many microbatches are open, or too much memory is held for them.
            BadSession: this one was dropped or sent again while it waited.
        """
        while not self._admitting.is_set():  # a loop, as it may be cleared again before this task goes on
            await self._admitting.wait()
        piece = microbatch.piece
        kept = self._work.open(piece, microbatch.hidden_BTD, samples=microbatch.samples)
        with self._work.unless_failed(piece, kept):
            output = await self._thread.run(Priority.FORWARD, lambda: self._compute_forward(microbatch, kept))
        self._work.check(piece, kept)
        return output

    async def backward(self, piece: Piece, grad_BTD: torch.Tensor, *, tokens: int) -> torch.Tensor:
        """The gradient with respect to the span's input; the adapter's own gradient stays here, pending.

        Raises:
            BadSession: no such piece of a microbatch is open here.
            BadGradient: the gradient overflowed; the piece is dropped.
        """
        kept, stash = self._work.take_stash(piece)
        with self._work.unless_failed(piece, kept):
            grad_input, gradients = await self._thread.run(
                Priority.BACKWARD, lambda: self._compute_backward(piece, kept, stash, grad_BTD)
            )
        self._work.answer(piece, kept, gradients, tokens=tokens)
        return grad_input

    async def commit(self, piece: Piece) -> None:
        """Count a piece, once. Repeating a commit is harmless.

        Raises:
            BadSession: it is neither pending nor counted here.
        """
        if not self.ledger.is_pending(piece):
            if self.ledger.is_counted(piece):
                return
            raise BadSession("no such microbatch is pending here (dropped, or never answered); send it again")
        fresh, gradients = self._work.commit(piece)
        counted = {unit: gradients[unit] for unit in self._units_of(fresh) if unit in gradients}
        # Submitted before anything is awaited, so that the compute thread adds in the order of the books; and not to be
        # cancelled, as it is counted now.
        added = self._thread.submit(Priority.STEP, lambda: self.unit_steps.add(counted))
        if self.ledger.due():
            if not self._mutating.locked():  # a round may take minutes, and no step is made before it ends
                self._admitting.clear()
            self._due.set()
        await asyncio.shield(asyncio.wrap_future(added))

    def drop(self, microbatch: MicrobatchId) -> None:
        """The trainer gave a microbatch up; what of it is not counted will not be."""
        for piece in self.ledger.pieces_of(microbatch):
            self._work.forget(piece)

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
            with suppress(TimeoutError):
                async with asyncio.timeout(sweep_seconds):  # not wait_for, which may swallow a cancellation
                    await self._due.wait()
            self._work.sweep()
            if self._due.is_set():
                self._due.clear()
                async with self.frozen(), self.drained():
                    await self._step(self.ledger.due())

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
            await self._work.drained()
            yield
        finally:
            if self.ledger.due():
                self._due.set()
            else:
                self._admitting.set()

    async def step_early(self, blocks: Iterable[int]) -> None:
        """Inside `drained`: a step on what is counted of `blocks`, though less than a batch: it goes with the host."""
        await self._step([block for block in blocks if self.ledger.tallies[block].samples])

    @property
    def dropped(self) -> int:
        """How many pieces were begun here and not counted."""
        return self._work.dropped

    def note_swarm_samples(self, samples_by_block: Mapping[int, int]) -> None:
        """Samples that the whole swarm has counted per block, from its records: the clock of the schedule."""
        self._swarm_samples = dict(samples_by_block)

    def _compute_forward(self, microbatch: Microbatch, kept: Kept) -> torch.Tensor:
        """In the compute thread, where the stashes of all earlier forwards are known."""
        output, kept.stash = self._compute.forward_train(
            microbatch.hidden_BTD,
            span=microbatch.span,
            mask_BT=microbatch.mask_BT,
            seed=dropout_seed(self._seed, microbatch.id),
            keep_graph=self._work.stash_bytes() < self._limits.stash_bytes,
        )
        kept.num_bytes = kept.stash.num_bytes
        return output

    def _compute_backward(
        self, piece: Piece, kept: Kept, stash: Stash, grad_BTD: torch.Tensor
    ) -> tuple[torch.Tensor, UnitGradients]:
        """In the compute thread. Parameters may have changed under a graph that was dropped meanwhile."""
        self._work.check(piece, kept)
        grad_input, gradients = self._compute.backward(stash, grad_BTD)
        finite = all(bool(torch.isfinite(g).all()) for named in gradients.values() for g in named.values())
        if not finite or not bool(torch.isfinite(grad_input).all()):
            raise BadGradient(
                "the gradient of this microbatch overflowed and was dropped; lower the learning rate or skip this text"
            )
        return grad_input, gradients

    def _units_of(self, blocks: Iterable[int]) -> list[UnitId]:
        units = (unit_of(self._adapter, block) for block in sorted(blocks))
        return [unit for unit in units if unit in self.unit_steps.units]

    async def _step(self, blocks: Iterable[int]) -> None:
        """Close the books of the blocks here, on the loop; the compute thread does the sums in the same order."""
        due: list[DueStep] = []
        for block in blocks:
            tally = self.ledger.tallies[block]
            before = tally.total_samples - tally.samples
            closed = self.ledger.stepped(block)
            samples = max(before, self._swarm_samples.get(block, 0) - closed.samples)
            due += [DueStep(unit=unit, tokens=closed.tokens, samples=samples) for unit in self._units_of([block])]
        if due:
            made = self._thread.submit(Priority.STEP, lambda: self.unit_steps.step(due))
            await asyncio.shield(asyncio.wrap_future(made))  # its books are closed: it is made even if nobody waits
            self.steps += 1
