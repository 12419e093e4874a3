"""The state of one unit as it is checkpointed, served to newcomers and exported: tensors and where they stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from blocks.spans import UnitId

OUTER_PREFIX = "outer/"
MOMENT_PREFIX = "moments/"


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitState:
    """One unit after its last completed round.

    `round` is the round that it last took part in (0: the run's seed); `weight` the samples that round weighed, which
    orders two outcomes of the same round; `total_samples` what the unit has learnt from in all. `outer` is what the
    holders agree on besides (see averaging.unit_round). All tensors are fp32 on the CPU; `digest` is the sha256 of
    `agreed` (see adapters.unit_digest). `moments` are one holder's own.
    """

    unit: UnitId
    round: int
    weight: float
    total_samples: int
    digest: bytes
    tensors: Mapping[str, torch.Tensor]
    outer: Mapping[str, torch.Tensor] = field(default_factory=dict)
    moments: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def version(self) -> tuple[int, float, bytes]:
        """The order in which replicas give way: newest round, then more samples, then the larger digest."""
        return self.round, self.weight, self.digest

    @property
    def is_untrained(self) -> bool:
        """Whether it is as the run's seed makes it, so that nobody need fetch or keep it."""
        return self.round == 0 and self.weight == 0


def agreed(tensors: Mapping[str, torch.Tensor], outer: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All that is equal on a unit's holders, under one set of names."""
    return {**tensors, **{f"{OUTER_PREFIX}{name}": tensor for name, tensor in outer.items()}}


def split(
    named: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Tensors, outer state and moments from one set of names, as they travel and lie on disk."""
    tensors: dict[str, torch.Tensor] = {}
    outer: dict[str, torch.Tensor] = {}
    moments: dict[str, torch.Tensor] = {}
    for name, tensor in named.items():
        if name.startswith(OUTER_PREFIX):
            outer[name.removeprefix(OUTER_PREFIX)] = tensor
        elif name.startswith(MOMENT_PREFIX):
            moments[name.removeprefix(MOMENT_PREFIX)] = tensor
        else:
            tensors[name] = tensor
    return tensors, outer, moments


def joined(state: UnitState) -> dict[str, torch.Tensor]:
    """The inverse of `split`."""
    moments = {f"{MOMENT_PREFIX}{name}": tensor for name, tensor in state.moments.items()}
    return {**agreed(state.tensors, state.outer), **moments}
