"""The state of one unit as it is checkpointed, served to newcomers and exported: tensors and where they stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from blocks.spans import UnitId


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitState:
    """One unit after its last completed round.

    `round` is the round that it last took part in (0: the run's seed); `weight` the samples that round weighed, which
    orders two outcomes of the same round; `total_samples` what the unit has learnt from in all. `tensors` and `moments`
    are fp32 on the CPU; `digest` is the sha256 of `tensors` (see adapters.unit_digest).
    """

    unit: UnitId
    round: int
    weight: float
    total_samples: int
    digest: bytes
    tensors: Mapping[str, torch.Tensor]
    moments: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def version(self) -> tuple[int, float, bytes]:
        """The order in which replicas give way: newest round, then more samples, then the larger digest."""
        return self.round, self.weight, self.digest
