"""What goes wrong in a chaos test, as data: who is killed, frozen, thawed or started again after which step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum


class FaultKind(StrEnum):
    KILL = "kill"  # SIGKILL: no goodbye, p2pd included
    FREEZE = "freeze"  # SIGSTOP: the connection stands and nobody answers
    THAW = "thaw"  # SIGCONT
    RESTART = "restart"  # the same command with the same state directory


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What happens to one process once the trainer has done step `at_step`."""

    kind: FaultKind
    name: str
    at_step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultPlan:
    """A series of faults. Whatever is left to chance is drawn from `seed`, so that a failure can be had again."""

    seed: int
    faults: tuple[Fault, ...] = ()

    def kill(self, name: str, *, at_step: int) -> FaultPlan:
        return self._with(FaultKind.KILL, name, at_step)

    def kill_one_of(self, names: Sequence[str], *, at_step: int) -> FaultPlan:
        """Kill whom the seed picks."""
        dice = random.Random(f"{self.seed}/{len(self.faults)}")
        return self.kill(dice.choice(list(names)), at_step=at_step)

    def freeze(self, name: str, *, at_step: int) -> FaultPlan:
        return self._with(FaultKind.FREEZE, name, at_step)

    def thaw(self, name: str, *, at_step: int) -> FaultPlan:
        return self._with(FaultKind.THAW, name, at_step)

    def restart(self, name: str, *, at_step: int) -> FaultPlan:
        return self._with(FaultKind.RESTART, name, at_step)

    def due(self, step: int) -> tuple[Fault, ...]:
        """The faults of one step, in the order in which they were planned."""
        return tuple(fault for fault in self.faults if fault.at_step == step)

    def _with(self, kind: FaultKind, name: str, at_step: int) -> FaultPlan:
        return replace(self, faults=(*self.faults, Fault(kind=kind, name=name, at_step=at_step)))
