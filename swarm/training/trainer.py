"""A trainer: brings data, runs its microbatches through the chain, and has held-out rows measured after each round.

Raw text never leaves this process; activations of it do.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from blocks.client import ClientModel
from blocks.training.ledger import MicrobatchId
from blocks.worker import ComputeThread, Priority
from peers.chains.train_chain import HeadResult, TrainChain, Work
from peers.directory import Directory
from peers.errors import NetworkFailed, PeerError
from peers.network import PeerId
from peers.records import TrainerRecord
from swarm.data.stream import DataPosition, DataStream, Microbatch, Sample, SampleSet, split_microbatches
from swarm.training.evaluation_sums import Evaluation
from swarm.training.state import LIFE_BITS, TrainerState, load_state, save_state

logger = logging.getLogger(__name__)

T = TypeVar("T")

STATE_NAME = "trainer.json"
_RECORD_LIFE_SECONDS = 60.0
_RECORD_BETWEEN_SECONDS = 2.0
_LEAVE_SECONDS = 5.0
_SMALLEST_TOKENS = 256  # below this a microbatch costs more in overhead than it gains in overlap


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerConfig:
    """What one trainer does: `steps` batches of `batch_size` samples (0: until stopped).

    `token_budget` bounds a microbatch's padded tokens, `in_flight` how many microbatches are under way at once.
    """

    batch_size: int
    steps: int = 0
    seed: int = 0
    token_budget: int = 2048
    in_flight: int = 8
    nickname: str = ""

    def __post_init__(self) -> None:
        if min(self.batch_size, self.token_budget, self.in_flight) < 1 or self.steps < 0:
            raise ValueError("a trainer's batch_size, token_budget and in_flight must be positive, steps not negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How a trainer stands after a step. `loss` is the step's mean per token in nats, `evaluation` the last one of its
    own held-out rows, `swarm_evaluation` the last over those of all trainers.
    """

    step: int
    samples: int
    loss: float
    tokens_per_second: float
    round: int
    peers: int
    evaluation: Evaluation | None = None
    swarm_evaluation: Evaluation | None = None


class Measuring(Protocol):
    """What measures held-out rows between steps; validation.Validation."""

    @property
    def own(self) -> Sequence[Evaluation]:
        """What this trainer's rows gave, in order."""

    @property
    def summed(self) -> Sequence[Evaluation]:
        """What the rows of all trainers gave, as it came."""

    @property
    def announced(self) -> int | None:
        """The last round that was measured; None: others need not wait for any."""

    def is_due(self) -> bool:
        """Whether a round is done that was not measured."""

    async def measure(self) -> None:
        """Do it, and tell the others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SwarmView:
    """What a trainer needs to know of the swarm around it: `round` is the newest that any host has done, `is_settled`
    says whether all have done one, as of the last `refresh`.
    """

    me: PeerId
    run: str
    directory: Directory
    round: Callable[[], int]
    is_settled: Callable[[int], bool]
    refresh: Callable[[], Awaitable[None]]
    num_peers: Callable[[], int]
    dht_time: Callable[[], float]


def pipelined(samples: Sequence[Sample], token_budget: int, in_flight: int) -> list[Microbatch]:
    """A batch as microbatches of at most `token_budget` padded tokens, and as many as may be in flight at once where
    that leaves each enough: while one is at the last host, others keep the hosts before it at work.

    The first is half as large, as the hosts further on wait for it with nothing else to do, and so is the last of a
    batch that the others divide evenly, for which those before wait.
    """
    padded = len(samples) * max(len(sample.input_ids) for sample in samples)
    budget = min(token_budget, max(_SMALLEST_TOKENS, padded // in_flight))
    return split_microbatches(samples, budget, first_budget=budget // 2)


class Head:
    """The trainer's own ends of the model: what enters block 0, and the loss over what leaves the last."""

    def __init__(self, client: ClientModel, thread: ComputeThread) -> None:
        self._client, self._thread = client, thread

    async def embed(self, microbatch: Microbatch) -> torch.Tensor:
        """What enters block 0, [B, T, D]."""
        return await self._thread.run(
            Priority.FORWARD, lambda: self._client.embed(microbatch.input_ids_BT, microbatch.mask_BT)
        )

    async def loss(self, microbatch: Microbatch, hidden_BTD: torch.Tensor) -> HeadResult:
        """The summed token loss and its gradient."""

        def compute() -> HeadResult:
            loss, grad, tokens = self._client.loss(
                hidden_BTD.to(self._client.dtype), microbatch.input_ids_BT, microbatch.mask_BT, microbatch.labels_BT
            )
            return HeadResult(loss=float(loss), grad_BTD=grad.float(), tokens=tokens)

        return await self._thread.run(Priority.BACKWARD, compute)

    async def evaluate(self, microbatch: Microbatch, hidden_BTD: torch.Tensor) -> tuple[float, int]:
        """The summed token loss and the number of tokens."""

        def compute() -> tuple[float, int]:
            loss, tokens = self._client.evaluate(
                hidden_BTD.to(self._client.dtype), microbatch.input_ids_BT, microbatch.mask_BT, microbatch.labels_BT
            )
            return float(loss), tokens

        return await self._thread.run(Priority.EVALUATE, compute)

    async def log_likelihoods(self, microbatch: Microbatch, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Of each token with a label: [B, T] fp32 in nats, 0 elsewhere."""

        def compute() -> torch.Tensor:
            return self._client.log_likelihoods(
                hidden_BTD.to(self._client.dtype), microbatch.input_ids_BT, microbatch.mask_BT, microbatch.labels_BT
            )

        return await self._thread.run(Priority.EVALUATE, compute)


class Trainer:
    """Trains over a chain. `run` returns when its steps are done; where the data stood is kept in `state`."""

    def __init__(
        self, chain: TrainChain, head: Head, view: SwarmView, data: SampleSet, config: TrainerConfig, *, state: Path
    ) -> None:
        self.losses: list[float] = []
        self.tokens = 0
        self.validation: Measuring | None = None
        """Measures before the first step and after every round."""
        self._chain, self._head, self._view, self._config, self._state = chain, head, view, config, state
        saved = load_state(state)
        self._step, self._samples = saved.step, saved.samples
        self._stream = DataStream(data, config.batch_size, config.seed, saved.position)
        # A batch that was cut short goes again under the same ids, so that no host counts a part of it twice.
        same_data = saved.position is not None and saved.position.fingerprint == data.fingerprint
        self._life = saved.life if same_data else secrets.randbits(LIFE_BITS)
        self._save(self._stream.position)
        self._told_at = float("-inf")
        self._leaving, self._has_left = asyncio.Lock(), False
        self._progress: Progress | None = None

    async def run(self, *, on_progress: Callable[[Progress], None] | None = None) -> None:
        """Train, and measure held-out rows in between.

        Raises:
            NoRoute: some blocks have no live holder, for longer than the router waits.
        """
        last = self._step + self._config.steps if self._config.steps else None
        while last is None or self._step < last:
            if self.validation is not None and self.validation.is_due():
                await self.validation.measure()
            self._progress = progress = await self._train_batch()
            if on_progress is not None:
                on_progress(progress)
            if abs(self._view.dht_time() - self._told_at) >= _RECORD_BETWEEN_SECONDS:
                await self.tell()

    async def _train_batch(self) -> Progress:
        batch = next(self._stream)
        began = time.monotonic()
        slots = asyncio.Semaphore(self._config.in_flight)
        microbatches = pipelined(batch.samples, self._config.token_budget, self._config.in_flight)
        results = await together(
            self._train_one(index, microbatch, slots) for index, microbatch in enumerate(microbatches)
        )
        labelled = sum(result.tokens for result in results)
        tokens = sum(int(microbatch.mask_BT.sum()) for microbatch in microbatches)
        self._step += 1
        self._samples += len(batch.samples)
        self.tokens += tokens
        loss = sum(result.loss for result in results) / max(1, labelled)
        self.losses.append(loss)
        self._save(batch.after)
        return Progress(
            step=self._step,
            samples=self._samples,
            loss=loss,
            tokens_per_second=tokens / max(1e-9, time.monotonic() - began),
            round=self._view.round(),
            peers=self._view.num_peers(),
            evaluation=_last(None if self.validation is None else self.validation.own),
            swarm_evaluation=_last(None if self.validation is None else self.validation.summed),
        )

    def _save(self, position: DataPosition) -> None:
        state = TrainerState(life=self._life, step=self._step, samples=self._samples, position=position)
        save_state(self._state, state)

    async def _train_one(self, index: int, microbatch: Microbatch, slots: asyncio.Semaphore) -> HeadResult:
        async with slots:
            work = Work(
                id=MicrobatchId(trainer=self._view.me, life=self._life, step=self._step, index=index),
                hidden_BTD=await self._head.embed(microbatch),
                mask_BT=microbatch.mask_BT,
            )
            return await self._chain.train(work, lambda hidden: self._head.loss(microbatch, hidden))

    async def tell(self) -> None:
        """Say to the swarm how this trainer stands after its last step."""
        if self._progress is not None:
            await self._publish(self._progress)

    async def leave(self) -> None:
        """Say that it trains no more, once, as far as the network and the time allow; else its record expires by
        itself. Whoever comes second waits for the first.
        """
        async with self._leaving:
            if self._progress is None or self._has_left:
                return
            self._has_left = True
            try:
                async with asyncio.timeout(_LEAVE_SECONDS):
                    await self._publish(self._progress)
            except (NetworkFailed, TimeoutError) as error:
                logger.info("left without a word: %s", error or "nobody took it in time")

    async def _publish(self, progress: Progress) -> None:
        now = self._told_at = self._view.dht_time()
        record = TrainerRecord(
            run=self._view.run,
            peer=self._view.me,
            nickname=self._config.nickname,
            loss=progress.loss,
            eval_loss=None if progress.evaluation is None else progress.evaluation.loss,
            tokens_per_second=progress.tokens_per_second,
            step=progress.step,
            round=progress.round,
            evaluated=None if self.validation is None else self.validation.announced,
            left=self._has_left,
            expires_at=now + _RECORD_LIFE_SECONDS,
        )
        await self._view.directory.publish(record)


def _last(evaluations: Sequence[Evaluation] | None) -> Evaluation | None:
    return evaluations[-1] if evaluations else None


async def together(works: Iterable[Coroutine[object, object, T]]) -> list[T]:
    """All results in order. The first failure ends the others; what a caller can meet comes as itself, not in a group.

    Raises:
        PeerError: as the works do.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(work) for work in works]
    except ExceptionGroup as group:
        expected = [error for error in group.exceptions if isinstance(error, PeerError)]
        if len(expected) < len(group.exceptions):
            raise  # a bug among them keeps its traceback
        raise expected[0] from None
    return [task.result() for task in running]
