"""All units of a run, trained in somebody's own loop: the run's side of them. Which thread may do what is step_gate's.

The optimizer and its schedule, the data and the evaluation are the loop's own. Start at `OwnUnits.begin`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from averaging.unit_round import UnitInput
from blocks.adapters import UnitParameters
from blocks.snapshots import DIGEST_BYTES
from blocks.spans import Span, UnitId, parse_unit
from blocks.training.ledger import Counted, Ledger
from blocks.unit_state import UnitState
from swarm.own_loops.step_gate import Stance, StepGate
from swarm.own_loops.steps import OwnSteps
from swarm.units.book import RoundResult, UnitBook
from swarm.units.checkpoint import DIRECTORY, save_checkpoint
from swarm.units.files import Checkpoint
from swarm.units.holder import RunRules
from swarm.units.kept import DIRECTORY as KEPT_DIRECTORY
from swarm.units.kept import KeptStore
from swarm.units.left_states import gather

logger = logging.getLogger(__name__)

_NOT_HELD = bytes(DIGEST_BYTES)  # of a block that has no adapter


class OwnUnits:
    """Implements holder.Holder. Coroutines and `count` belong on the node's loop."""

    def __init__(
        self, parameters: UnitParameters, span: Span, rules: RunRules, gate: StepGate, state: Path, *, keep_bytes: int
    ) -> None:
        self.span, self.rules, self.gate = span, rules, gate
        self.kept = KeptStore(state / KEPT_DIRECTORY, run=rules.run, layout=rules.layout, most_bytes=keep_bytes)
        self.steps = OwnSteps(parameters, rules.optimizer.local, rules.units.recipe)
        self.ledger = Ledger(span, batch_size=rules.batch_size)
        self.round = 0
        self._state = state
        self._book = UnitBook(parameters, rules.lora, self.steps, rules.units)

    @property
    def units(self) -> Mapping[UnitId, UnitState]:
        """See Holder."""
        return self._book.states

    async def begin(self) -> None:
        """Start from the run's seed, or from what this peer has left on disk; the parameters are replaced by that.

        Raises:
            BadCheckpoint: the state directory belongs to another run.
        """
        async with self.gate.visit(Stance.FREE):
            await asyncio.to_thread(self._begin)
        for unit in self.units:
            self._close_books(unit, Counted())

    def count(self, *, samples: int, tokens: int) -> None:
        """The loop made an optimizer step on so many samples and tokens with a label."""
        self.ledger.made_step(samples=samples, tokens=tokens)

    def digests(self) -> dict[int, bytes]:
        """See Holder."""
        told = {parse_unit(unit)[1]: state.digest[:DIGEST_BYTES] for unit, state in self.units.items()}
        return {block: told.get(block, _NOT_HELD) for block in self.span.blocks()}

    def counted(self) -> dict[UnitId, Counted]:
        """See Holder."""
        return {unit: self.ledger.tallies[parse_unit(unit)[1]].since_round for unit in self.units}

    def total_samples(self) -> int:
        """See Holder."""
        return max(tally.total_samples for tally in self.ledger.tallies.values())

    def note_swarm_samples(self, samples_by_block: Mapping[int, int]) -> None:
        """See Holder; the schedule is the loop's own."""

    async def read_unit(self, unit: UnitId, *, moments: bool) -> UnitState | None:
        """See peers.units.service.UnitSource; without moments, which are the loop's own."""
        return self.units.get(unit)

    async def read_inputs(self) -> dict[UnitId, UnitInput]:
        """See Holder."""
        async with self.gate.visit(Stance.READING):
            return await asyncio.to_thread(self._book.inputs)

    @asynccontextmanager
    async def in_round(self) -> AsyncIterator[None]:
        """See Holder."""
        async with self.gate.visit(Stance.READING):
            yield

    async def apply(self, result: RoundResult) -> None:
        """See Holder."""
        async with self.gate.visit(Stance.FREE):
            await asyncio.to_thread(self._book.apply, result)
            self.round = result.number
            for unit in result.applied:
                self._close_books(unit, result.counted[unit])

    async def adopt(self, states: Mapping[UnitId, UnitState], number: int, *, staying: Collection[UnitId] = ()) -> None:
        """See Holder."""
        async with self.gate.visit(Stance.FREE):
            lost = self.counted() | dict.fromkeys(staying, Counted())  # what goes must not be weighed
            await asyncio.to_thread(self._book.take, states, staying)
            self.round = number
            for unit in states:
                self._close_books(unit, lost[unit])

    async def shared_round(self) -> int | None:
        """The round whose result the parameters are, all of them and nothing else; None where they are not. The loop
        must not be training.
        """
        async with self.gate.visit(Stance.READING):
            rounds = {self.round, *(state.round for state in self.units.values())}
            is_shared = len(rounds) == 1 and await asyncio.to_thread(self._book.is_as_agreed)
            return self.round if is_shared else None

    async def restart(self) -> None:
        """Put the state as of the last round in place of what the loop has in its parameters now."""
        await self.adopt(self.units, self.round)

    async def fold(self, units: Iterable[UnitId]) -> frozenset[UnitId]:
        """See Host.fold."""
        async with self.gate.visit(Stance.FREE):
            counted = self.counted()
            trained = {unit: counted[unit] for unit in units if counted[unit].steps}
            if trained:
                await asyncio.to_thread(self._book.fold, trained)
            for unit, work in trained.items():
                self._close_books(unit, work)
        return frozenset(trained)

    async def checkpoint(self) -> None:
        """See Holder."""
        checkpoint = Checkpoint(run=self.rules.run, layout=self.rules.layout, round=self.round, units=dict(self.units))
        await asyncio.to_thread(save_checkpoint, self._state / DIRECTORY, checkpoint)

    def _begin(self) -> None:
        self._book.begin()
        self.kept.load()
        left = gather(self._state, (), self.kept, self.units)
        if left is not None:
            self.round = left.round
            logger.info("resumed round=%d units=%d", left.round, len(left.units))
        self._book.take({**self.units, **({} if left is None else left.units)})

    def _close_books(self, unit: UnitId, counted: Counted) -> None:
        """On the loop, like all that the ledger is told."""
        total = self.units[unit].total_samples
        self.ledger.round_done(parse_unit(unit)[1], counted=counted, total_samples=total)
