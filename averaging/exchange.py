"""The seam between the rules of a round and the network that carries it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from blocks.spans import UnitId
from peers.network import PeerId


@dataclass(frozen=True, kw_only=True, slots=True)
class Contribution:
    """What one peer brings to a round, as gathered by matchmaking and signed by the peer itself.

    `weights` are samples per unit since the unit's last round; `layout` is a digest of the adapter settings, so
    that peers whose tensors have other shapes never meet in one all-reduce.
    """

    peer: PeerId
    number: int
    layout: str
    weights: Mapping[UnitId, float]
    megabits_per_second: float = 0.0
    client_mode: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Who takes part in a round: an id that nobody chose alone, and the contributions in an agreed order."""

    group_id: bytes
    contributions: tuple[Contribution, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitClass:
    """Units with the same holders: averaged together by one all-reduce among exactly `holders`."""

    class_id: bytes
    holders: tuple[PeerId, ...]
    units: tuple[UnitId, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reduced:
    """How one class's all-reduce ended here. `tensors` is None where anything was missing, and `reason` says what."""

    tensors: tuple[torch.Tensor, ...] | None
    digest: bytes = b""
    reason: str = ""
    bytes_sent: int = 0
    bytes_received: int = 0
    missing: frozenset[PeerId] = field(default_factory=frozenset)


@dataclass(frozen=True, kw_only=True, slots=True)
class Vote:
    """One holder's word on one class: whether every part came, and the digest of its result."""

    class_id: bytes
    complete: bool
    digest: bytes


class Exchange(Protocol):
    """Find the others of a round, swap tensors with them, and agree whether it worked."""

    async def gather(self, mine: Contribution, *, begin_at: float, deadline: float, expected: int) -> Group | None:
        """One matchmaking. `begin_at` and `deadline` are DHT times in seconds; None when no group was found."""

    async def reduce(
        self, group: Group, classes: Sequence[UnitClass], tensors: Mapping[bytes, Sequence[torch.Tensor]]
    ) -> Mapping[bytes, Reduced]:
        """All-reduce every class at once.

        `tensors[class_id]` is one flat fp32 vector on the CPU, already scaled by this peer's share. A class without
        one cannot take place: the others are told at once.
        """

    async def vote(
        self, group: Group, classes: Sequence[UnitClass], votes: Mapping[bytes, Vote], *, deadline: float
    ) -> Mapping[bytes, Mapping[PeerId, Vote]]:
        """Tell all holders of each class this peer's vote, and wait for theirs until `deadline`."""
