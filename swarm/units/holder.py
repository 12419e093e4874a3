"""What rounds, keepers and newcomers need of whoever holds units: a host, or somebody's own training loop."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from averaging.unit_round import UnitInput, UnitRules
from blocks.adapters import LoraSettings
from blocks.spans import Span, UnitId
from blocks.training.ledger import Counted
from blocks.training.optimizer import OptimizerConfig
from blocks.unit_state import UnitState
from swarm.units.book import RoundResult
from swarm.units.kept import KeptStore


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRules:
    """What the run prescribes to every holder, in the terms of `blocks`; `shapes` are those of the whole adapter."""

    run: str
    layout: str
    lora: LoraSettings
    optimizer: OptimizerConfig
    batch_size: int
    units: UnitRules
    shapes: Mapping[UnitId, Mapping[str, tuple[int, ...]]]


class Holder(Protocol):
    """Units of some blocks, all of them trained here. Implemented by host.Host and own_loops.units.OwnUnits."""

    @property
    def span(self) -> Span:
        """The blocks."""

    @property
    def rules(self) -> RunRules:
        """The run's."""

    @property
    def kept(self) -> KeptStore:
        """Others' units that are stored here."""

    @property
    def round(self) -> int:
        """The round that this holder stands at."""

    @property
    def units(self) -> Mapping[UnitId, UnitState]:
        """Every held unit as of its last completed round, without moments."""

    def digests(self) -> dict[int, bytes]:
        """A short digest per block."""

    def counted(self) -> dict[UnitId, Counted]:
        """The work on each unit since its last round: what it weighs in the next."""

    def total_samples(self) -> int:
        """Samples that the block which has seen most has learnt from."""

    def note_swarm_samples(self, samples_by_block: Mapping[int, int]) -> None:
        """Samples that the whole swarm has counted per block, from its records."""

    async def read_unit(self, unit: UnitId, *, moments: bool) -> UnitState | None:
        """See peers.units.service.UnitSource."""

    async def read_inputs(self) -> dict[UnitId, UnitInput]:
        """What a round takes: copies of what is being trained, and what it began from."""

    def in_round(self) -> AbstractAsyncContextManager[None]:
        """No optimizer step inside: what `read_inputs` gives stays true until `apply` replaces it."""

    async def apply(self, result: RoundResult) -> None:
        """Inside `in_round`: take a round's result for some units; the others stay as they are."""

    async def adopt(self, states: Mapping[UnitId, UnitState], number: int, *, staying: Collection[UnitId] = ()) -> None:
        """Take other holders' newer state and stand at round `number`; BadAdapter where tensors do not fit.

        What was trained since the last round goes with the old state. Of `staying` units it stays on top of the new
        one, and is weighed in the next round.
        """

    async def fold(self, units: Iterable[UnitId]) -> frozenset[UnitId]:
        """Before this holder leaves: make what it trained of `units` since the last round part of their state; returns
        those that were trained.
        """

    async def checkpoint(self) -> None:
        """Write all units as of the last round to disk; BadCheckpoint where it cannot be."""
