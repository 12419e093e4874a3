"""What a peer does as a host: a span with its LoRA, trained and served, whose units follow the run's rounds.

Here the parts of `blocks` meet: compute, training, caches and snapshots. The network side is in `node.py`, the timing
of rounds in `rounds.py`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from averaging.unit_round import UnitInput
from blocks.adapters import LoraSettings, add_version, drop_version, parameters_by_unit, unit_shapes
from blocks.compute import SpanCompute
from blocks.decoding.cache import SessionCaches
from blocks.load import SpanModel, load_span
from blocks.quantize import Quantization
from blocks.self_check import check_gradients
from blocks.snapshots import DIGEST_BYTES, Snapshot, SnapshotShelf
from blocks.source import ModelSource
from blocks.spans import Span, UnitId, parse_unit
from blocks.training.ledger import Counted, Ledger
from blocks.training.open_work import TrainingLimits
from blocks.training.span_trainer import SpanTrainer
from blocks.unit_state import UnitState
from blocks.worker import ComputeThread, Priority
from peers.chains.decode_service import PLAIN_LABEL
from swarm.units.book import RoundResult, UnitBook
from swarm.units.checkpoint import DIRECTORY, save_checkpoint
from swarm.units.files import Checkpoint
from swarm.units.holder import RunRules
from swarm.units.kept import DIRECTORY as KEPT_DIRECTORY
from swarm.units.kept import KeptStore
from swarm.units.left_states import gather

logger = logging.getLogger(__name__)

_PROBE_TOKENS = 64
_PROBE_BLOCKS = 4
_PROBE_SECONDS = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class HostConfig:
    """How one host computes; `cache_bytes` are for KV caches, `num_threads` for torch (None: its own choice).

    `keep_bytes` of disk are for others' units; `resume` are directories of dead peers whose units it takes over.
    """

    span: Span
    dtype: torch.dtype
    device: torch.device
    quantize: Quantization | None = None
    cache_bytes: int = 512 << 20
    num_threads: int | None = None
    limits: TrainingLimits = field(default_factory=TrainingLimits)
    keep_bytes: int = 1 << 30
    resume: tuple[Path, ...] = ()


class Host:
    """One span at work. Made by `load_host`; `run()` belongs in the node's task group."""

    def __init__(
        self, compute: SpanCompute, thread: ComputeThread, config: HostConfig, rules: RunRules, state: Path
    ) -> None:
        self.span = compute.model.span
        self.config, self.rules = config, rules
        self.thread = thread
        self.shelf = SnapshotShelf(keep=3)
        self.caches = SessionCaches(compute.model, config.cache_bytes)
        self.trainer = SpanTrainer(
            compute,
            thread,
            Ledger(self.span, batch_size=rules.batch_size),
            rules.optimizer,
            config.limits,
            time.monotonic,
        )
        self.kept = KeptStore(state / KEPT_DIRECTORY, run=rules.run, layout=rules.layout, most_bytes=config.keep_bytes)
        self.tokens_per_second = 0.0
        self.backward_tokens_per_second = 0.0
        self._compute, self._state = compute, state
        self._book = UnitBook(parameters_by_unit(compute.model), compute.settings, self.trainer.unit_steps, rules.units)
        self._next_label = 0

    @property
    def model(self) -> SpanModel:
        """The blocks themselves."""
        return self._compute.model

    @property
    def round(self) -> int:
        """The round that this host stands at: that of what it serves."""
        return self.shelf.newest.round

    @property
    def units(self) -> Mapping[UnitId, UnitState]:
        """Every held unit as of its last completed round, without moments."""
        return self._book.states

    def digests(self) -> dict[int, bytes]:
        """A short digest per block, of what is served."""
        return dict(self.shelf.newest.digests)

    def counted(self) -> dict[UnitId, Counted]:
        """The work on each unit since its last round: what it weighs in the next."""
        return {unit: self.trainer.ledger.tallies[parse_unit(unit)[1]].since_round for unit in self.units}

    def total_samples(self) -> int:
        """See Holder."""
        return max(tally.total_samples for tally in self.trainer.ledger.tallies.values())

    def note_swarm_samples(self, samples_by_block: Mapping[int, int]) -> None:
        """See Holder: the clock of the schedule."""
        self.trainer.note_swarm_samples(samples_by_block)

    async def begin(self) -> None:
        """Start from the run's seed, or from what this peer and others have left on disk; measure the device.

        Raises:
            BadCheckpoint: a directory belongs to another run.
        """
        await self.thread.run(Priority.STEP, self._begin)
        for unit in self.units:
            self._close_books(unit, Counted())

    async def run(self) -> None:
        """Make optimizer steps as they fall due, until cancelled."""
        await self.trainer.run()

    async def read_unit(self, unit: UnitId, *, moments: bool) -> UnitState | None:
        """See peers.units.service.UnitSource."""
        state = self.units.get(unit)
        if state is None or not moments or self.rules.lora.own_rank:  # moments of another rank mean nothing elsewhere
            return state
        found = await self.thread.run(Priority.STEP, lambda: self.trainer.unit_steps.read_moments([unit]))
        return replace(state, moments=found[unit])

    async def read_inputs(self) -> dict[UnitId, UnitInput]:
        """What a round takes: copies of what is being trained, at a step boundary, and what it began from."""
        return await self.thread.run(Priority.STEP, self._book.inputs)

    @asynccontextmanager
    async def in_round(self) -> AsyncIterator[None]:
        """No optimizer step inside: what `read_inputs` gives stays true until `apply` replaces it."""
        async with self.trainer.frozen():
            yield

    async def apply(self, result: RoundResult) -> None:
        """Inside `in_round`: take a round's result for some units; the others stay as they are."""
        async with self.trainer.drained():
            await self.thread.run(Priority.STEP, lambda: self._write_round(result))
            for unit in result.applied:
                self._close_books(unit, result.counted[unit])

    async def adopt(self, states: Mapping[UnitId, UnitState], number: int, *, staying: Collection[UnitId] = ()) -> None:
        """See Holder; moments are taken where they came along.

        Raises:
            BadAdapter: tensors do not fit; nothing was changed.
        """
        async with self.trainer.frozen(), self.trainer.drained():
            lost = self.counted() | dict.fromkeys(staying, Counted())  # what goes must not be weighed
            await self.thread.run(Priority.STEP, lambda: self._adopt(states, number, staying))
            for unit in states:
                self._close_books(unit, lost[unit])

    async def fold(self, units: Iterable[UnitId]) -> frozenset[UnitId]:
        """Before this host leaves: make what it trained of `units` since the last round part of their state, with a
        last step on what it had counted for the next one.

        Returns those that were trained. Only for units that no other live host holds: to others it would be newer than
        what they trained themselves.
        """
        wanted = list(units)
        async with self.trainer.frozen(), self.trainer.drained():
            await self.trainer.step_early(parse_unit(unit)[1] for unit in wanted)
            counted = self.counted()
            trained = {unit: counted[unit] for unit in wanted if counted[unit].steps}
            if trained:
                await self.thread.run(Priority.STEP, lambda: self._fold(trained))
            for unit, work in trained.items():
                self._close_books(unit, work)
        return frozenset(trained)

    async def checkpoint(self) -> None:
        """Write all units as of the last round to disk.

        Raises:
            BadCheckpoint: it cannot be written.
        """
        moments = await self.thread.run(Priority.STEP, self.trainer.unit_steps.read_moments)
        units = {unit: replace(state, moments=moments[unit]) for unit, state in self.units.items()}
        checkpoint = Checkpoint(run=self.rules.run, layout=self.rules.layout, round=self.round, units=units)
        await asyncio.to_thread(save_checkpoint, self._state / DIRECTORY, checkpoint)
        for unit in self.kept.units.keys() & units.keys():  # kept before it was held, and now safe in the checkpoint
            await asyncio.to_thread(self.kept.drop, unit)

    def drop_versions(self, snapshots: list[Snapshot]) -> None:
        """Remove snapshots that nobody needs from the model, when the compute thread comes to it."""
        for snapshot in snapshots:
            self.thread.submit(Priority.STEP, lambda label=snapshot.label: drop_version(self.model, label))  # type: ignore[misc]

    def close(self) -> None:
        """End the compute thread."""
        self.thread.close()

    def _close_books(self, unit: UnitId, counted: Counted) -> None:
        """On the loop, like all that the ledger is told: what a round weighed is done, what came since stays."""
        total = self.units[unit].total_samples
        self.trainer.ledger.round_done(parse_unit(unit)[1], counted=counted, total_samples=total)

    def _begin(self) -> None:
        self._book.begin()
        plain = {
            unit: {name: torch.zeros(shape) for name, shape in shapes.items()}
            for unit, shapes in unit_shapes(self.model).items()
        }
        add_version(self.model, PLAIN_LABEL, plain)  # B is zero, so this is the base model to the bit
        number = 0
        self.kept.load()
        left = gather(self._state, self.config.resume, self.kept, self.units)
        if left is not None:
            number = left.round
            self._book.take(left.units)
            logger.info("resumed round=%d units=%d", number, len(left.units))
        self._publish(number)
        self.tokens_per_second, self.backward_tokens_per_second = _measured(self._compute, self.config)

    def _adopt(self, states: Mapping[UnitId, UnitState], number: int, staying: Collection[UnitId]) -> None:
        self._book.take(states, staying)
        self._publish(number)

    def _fold(self, units: Mapping[UnitId, Counted]) -> None:
        self._book.fold(units)
        self._publish(self.round)

    def _write_round(self, result: RoundResult) -> None:
        self._book.apply(result)
        self._publish(result.number)

    def _publish(self, number: int) -> None:
        label = f"snapshot-{self._next_label}"
        self._next_label += 1
        add_version(self.model, label, {unit: state.tensors for unit, state in self.units.items()})
        digests = dict.fromkeys(self.span.blocks(), bytes(DIGEST_BYTES))  # a block may have no adapter
        digests |= {parse_unit(unit)[1]: state.digest[:DIGEST_BYTES] for unit, state in self.units.items()}
        self.drop_versions(self.shelf.add(Snapshot(label=label, round=number, digests=digests)))


def _measured(compute: SpanCompute, config: HostConfig) -> tuple[float, float]:
    """Tokens per second through the span, forward and backward: the median of three short passes.

    A few blocks stand for all of them, as every second here is one later in the swarm.
    """
    span = compute.model.span
    some = Span(span.start, min(span.end, span.start + _PROBE_BLOCKS))
    forward, backward = _passes(compute, some, config)
    share = len(some) / len(span)
    speeds = share * _PROBE_TOKENS / sorted(forward)[1], share * _PROBE_TOKENS / sorted(backward)[1]
    logger.info("device measured tokens_per_second=%.0f", speeds[0])
    return speeds


def _passes(compute: SpanCompute, some: Span, config: HostConfig) -> tuple[list[float], list[float]]:
    """Seconds of three short passes through some blocks: forward, backward."""
    size = compute.model.source.hidden_size
    hidden = torch.zeros(1, _PROBE_TOKENS, size, dtype=config.dtype, device=config.device)
    forward, backward = [], []
    for _ in range(3):
        began = time.perf_counter()
        _, stash = compute.forward_train(hidden, span=some, mask_BT=None, seed=0, keep_graph=True)
        middle = time.perf_counter()
        compute.backward(stash, hidden)
        forward.append(middle - began)
        backward.append(time.perf_counter() - middle)
    return forward, backward


async def measure_block_rate(source: ModelSource, config: HostConfig, lora: LoraSettings) -> float:
    """Blocks x tokens this device computes each second, forward and backward, by one block that is loaded for it: for
    whoever does not know yet what to hold. The fastest of some passes counts, as others may be at work here.

    Raises:
        BlockError: the block or the adapter settings do not fit.
    """
    thread = ComputeThread(num_threads=config.num_threads)
    try:
        return await thread.run(Priority.STEP, lambda: _block_rate(source, config, lora))
    finally:
        await asyncio.to_thread(thread.close)


def _block_rate(source: ModelSource, config: HostConfig, lora: LoraSettings) -> float:
    one = Span(config.span.start, config.span.start + 1)
    model = load_span(source, one, dtype=config.dtype, device=config.device, quantize=config.quantize)
    compute, began, fastest = SpanCompute(model, lora), time.perf_counter(), math.inf
    while True:
        forward, backward = _passes(compute, one, config)
        fastest = min(fastest, min(forward) + min(backward))
        if time.perf_counter() - began > _PROBE_SECONDS:
            return _PROBE_TOKENS / fastest


async def load_host(source: ModelSource, config: HostConfig, rules: RunRules, state: Path) -> Host:
    """Load the span's weights in the compute thread and start from seed or checkpoint.

    Raises:
        BlockError: the model, the span or the adapter settings do not fit, or gradients are wrong on this device.
        BadCheckpoint: the state directory belongs to another run.
    """
    thread = ComputeThread(num_threads=config.num_threads)
    try:
        compute = await thread.run(
            Priority.STEP,
            lambda: SpanCompute(
                load_span(source, config.span, dtype=config.dtype, device=config.device, quantize=config.quantize),
                rules.lora,
            ),
        )
        host = Host(compute, thread, config, rules, state)
        logger.info("blocks loaded blocks=%s dtype=%s", config.span, config.dtype)
        await host.begin()
        await thread.run(Priority.STEP, lambda: check_gradients(compute))
    except BaseException:
        thread.close()
        raise
    return host
