"""The seam between the rules of a round and the network that carries it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from averaging.robust import Segment
from blocks.spans import UnitId
from peers.network import PeerId

VERSION_DIGEST_BYTES = 8


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Version:
    """Which state of a unit a peer has. Ordered: the greater is the newer, and equal ones are equal to the bit.

    `number` is the round that made it (0: the run's seed), `weight` the samples behind that round, `digest` the
    beginning of the state's own.
    """

    number: int = 0
    weight: float = 0.0
    digest: bytes = b""


@dataclass(frozen=True, kw_only=True, slots=True)
class Brought:
    """What one peer has done for one unit since its last round, and the state that it did it on."""

    samples: float
    tokens: float = 0.0
    steps: int = 1
    version: Version = field(default_factory=Version)


@dataclass(frozen=True, kw_only=True, slots=True)
class Contribution:
    """What one peer brings to a round, as gathered by matchmaking and signed by the peer itself.

    `layout` is a digest of the adapter's and the rounds' settings, so that peers whose tensors or rules differ never
    meet in one all-reduce; `distrusts` are those whom this peer has banned.
    """

    peer: PeerId
    number: int
    layout: str
    units: Mapping[UnitId, Brought]
    megabits_per_second: float = 0.0
    client_mode: bool = False
    distrusts: frozenset[PeerId] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """When and whom to meet: from `begin_at` until `deadline` (DHT time, s), closing after `window` s or when all came.

    `expected` counts this peer too. `label` names one of several groups of a large run (0s and 1s; empty: there is but
    one), and `is_mixing` says that they hold different states in between (grouping.py).
    """

    begin_at: float
    window: float
    deadline: float
    expected: int
    label: str = ""
    is_mixing: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Who takes part in a round: an id that nobody chose alone, and the contributions in an agreed order."""

    group_id: bytes
    contributions: tuple[Contribution, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitClass:
    """Units with the same holders: averaged together by one all-reduce among exactly `holders`.

    Where none of them can be dialled, `helpers` reduce for them: reachable members of the group that hold none of it.
    """

    class_id: bytes
    holders: tuple[PeerId, ...]
    units: tuple[UnitId, ...]
    helpers: tuple[PeerId, ...] = ()

    @property
    def reducers(self) -> tuple[PeerId, ...]:
        """Who may combine parts: first the holders, so that one's place among them is its place here, too."""
        return self.holders + self.helpers


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClassWork:
    """One class's all-reduce as this peer enters it.

    `vector` is flat, fp32 on the CPU, not scaled; None when this peer cannot bring it, which the others are told at
    once. Who only reduces brings zeros, which count for nothing. `segments` say what each holder's values count for
    where. `owed_sent` and `owed_sum` are what lossy codecs have kept back before, of what this peer sent and of the
    sums that it made; same shape as `vector`.
    """

    unit_class: UnitClass
    vector: torch.Tensor | None
    segments: tuple[Segment, ...] = ()
    owed_sent: torch.Tensor | None = None
    owed_sum: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reduced:
    """How one class's all-reduce ended here. `mean` is None where anything was missing, and `reason` says what; or,
    with no reason, where this peer only reduced for others.

    `missing` could not finish; `dropped` sent values that no update can have, and were left out of the parts that this
    peer combined; `doubted` combined parts in a way that is out of line with the others (robust.py).
    """

    mean: torch.Tensor | None
    digest: bytes = b""
    reason: str = ""
    bytes_sent: int = 0
    bytes_received: int = 0
    missing: frozenset[PeerId] = field(default_factory=frozenset)
    dropped: frozenset[PeerId] = field(default_factory=frozenset)
    doubted: frozenset[PeerId] = field(default_factory=frozenset)
    owed_sent: torch.Tensor | None = None
    owed_sum: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Vote:
    """One holder's word on one class: whether every part came, the digest of its result, and whom it accuses of what.

    `probes` are its brought products seen through a few random pairs of vectors (merging.probes), fp32 as bytes.
    """

    class_id: bytes
    complete: bool
    digest: bytes
    dropped: frozenset[PeerId] = frozenset()
    doubted: frozenset[PeerId] = frozenset()
    probes: bytes = b""


class Exchange(Protocol):
    """Find the others of a round, swap tensors with them, and agree whether it worked."""

    async def gather(self, mine: Contribution, call: Call) -> Group | None:
        """One matchmaking; None when no group was found."""

    async def reduce(self, group: Group, work: Sequence[ClassWork]) -> Mapping[bytes, Reduced]:
        """All-reduce every class at once; results by class id."""

    async def vote(
        self, group: Group, classes: Sequence[UnitClass], votes: Mapping[bytes, Vote], *, deadline: float
    ) -> Mapping[bytes, Mapping[PeerId, Vote]]:
        """Tell all holders of each class this peer's vote, and wait for theirs until `deadline`.

        Also for who only reduces for others, and has no class of its own: it hands on what it is told.
        """
