"""What goes wrong with a swarm, as data: which fault strikes whom, when, for how long. Pure, and drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum


class FaultKind(StrEnum):
    """Each is undone after its fault's seconds; parts/harm.py says how both are done."""

    KILL = "kill"  # SIGKILL: no goodbye, p2pd included; undone by a start from the same state directory
    RESTART = "restart"  # SIGTERM: it leaves in order, and is started again
    STOP = "stop"  # SIGSTOP, as of a laptop that sleeps: its connections stand and nobody answers; then SIGCONT
    PARTITION = "partition"  # nothing passes between it and all others; connections stand, as bytes are just lost
    SLOW = "slow"  # its link takes long and carries little
    DISK = "disk"  # no file of it can grow by a byte
    CLOCK = "clock"  # its clock jumps, and jumps back
    GARBAGE = "garbage"  # strangers send random bytes to its port, and open connections on which they say nothing


ALL_KINDS = tuple(FaultKind)
STARTS_AGAIN = (FaultKind.KILL, FaultKind.RESTART)  # undone by a new process


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One fault of one host. `at` counts what the reader of the plan counts: the trainer's steps, or seconds.

    It is undone `seconds` after it struck; None: not by the plan.
    """

    kind: FaultKind
    name: str
    at: float
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultPlan:
    """A series of faults. Whatever is left to chance is drawn from `seed`, so that a failure can be had again."""

    seed: int
    faults: tuple[Fault, ...] = ()

    def add(self, kind: FaultKind, name: str, *, at: float, seconds: float | None = None) -> FaultPlan:
        """One more."""
        return replace(self, faults=(*self.faults, Fault(kind=kind, name=name, at=at, seconds=seconds)))

    def add_one_of(
        self, kind: FaultKind, names: Sequence[str], *, at: float, seconds: float | None = None
    ) -> FaultPlan:
        """One more, of whom the seed picks."""
        dice = random.Random(f"{self.seed}/{len(self.faults)}")
        return self.add(kind, dice.choice(list(names)), at=at, seconds=seconds)

    def due(self, after: float, until: float) -> tuple[Fault, ...]:
        """Faults later than `after` and not later than `until`, in the order in which they were planned."""
        return tuple(fault for fault in self.faults if after < fault.at <= until)


def storm(
    seed: int,
    groups: Mapping[str, Sequence[str]],
    *,
    every_seconds: float,
    kinds: Sequence[FaultKind] = ALL_KINDS,
    lasting_seconds: tuple[float, float] = (2.0, 8.0),
) -> Iterator[Fault]:
    """Faults without end, one every `every_seconds` give or take a half; `at` is in seconds.

    Each kind comes once before any comes again. A host is struck while others of its group (those who hold the same
    blocks) are whole: at least one of each group is left alone at any time, and for `every_seconds` after a fault its
    host rests.
    """
    dice = random.Random(seed)
    busy_until = {name: 0.0 for names in groups.values() for name in names}
    bag: list[FaultKind] = []
    at = 0.0
    while True:
        at += every_seconds * dice.uniform(0.5, 1.5)
        bag = bag or dice.sample(list(kinds), len(kinds))
        free = [
            name
            for names in groups.values()
            for name in names
            if busy_until[name] <= at and sum(busy_until[other] <= at for other in names) > 1
        ]
        if not free:
            continue
        seconds = dice.uniform(*lasting_seconds)
        fault = Fault(kind=bag.pop(), name=dice.choice(free), at=at, seconds=seconds)
        busy_until[fault.name] = at + seconds + every_seconds
        yield fault
