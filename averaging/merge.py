"""Tensor maths of a round: one flat vector per class and back, the digest of a result, and the mean as a reference.

All tensors are fp32 on the CPU.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch

from averaging.errors import BadTensors
from averaging.robust import Segment
from blocks.spans import UnitId

UnitTensors = Mapping[str, torch.Tensor]
"""One unit's tensors by name: fp32 on the CPU."""


def check(units: Sequence[UnitId], tensors: Mapping[UnitId, UnitTensors]) -> None:
    """Refuse to take part with tensors that no round can carry.

    Raises:
        BadTensors: a unit is missing, empty, not fp32 on the CPU, or not finite.
    """
    for unit in units:
        if not tensors.get(unit):
            raise BadTensors(f"{unit} was announced for the round but is not held any more")
        for name, tensor in tensors[unit].items():
            if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
                raise BadTensors(f"{unit} {name} is {tensor.dtype} on {tensor.device}; rounds take float32 on the CPU")
            if not is_finite(tensor):
                raise BadTensors(f"{unit} {name} holds values that are not finite; the step has diverged")


def flatten(units: Sequence[UnitId], tensors: Mapping[UnitId, UnitTensors]) -> torch.Tensor:
    """The class's vector: units in the given order, their tensors by name. They have passed `check`."""
    return torch.cat([tensor.detach().reshape(-1) for unit in units for _, tensor in sorted(tensors[unit].items())])


def segments(
    units: Sequence[UnitId], tensors: Mapping[UnitId, UnitTensors], shares: Mapping[UnitId, tuple[float, ...]]
) -> tuple[Segment, ...]:
    """Where in `flatten(units, tensors)` each holder's values count for how much."""
    found: list[Segment] = []
    offset = 0
    for unit in units:
        size = sum(tensor.numel() for tensor in tensors[unit].values())
        if found and found[-1].shares == shares[unit]:
            found[-1] = Segment(start=found[-1].start, stop=offset + size, shares=shares[unit])
        else:
            found.append(Segment(start=offset, stop=offset + size, shares=shares[unit]))
        offset += size
    return tuple(found)


def unflatten(
    vector: torch.Tensor, units: Sequence[UnitId], like: Mapping[UnitId, UnitTensors]
) -> dict[UnitId, dict[str, torch.Tensor]]:
    """The inverse of `flatten`: views of `vector`, with the shapes of `like`."""
    num_values = sum(tensor.numel() for unit in units for tensor in like[unit].values())
    if num_values != vector.numel():
        raise ValueError(f"{vector.numel()} values do not fill units of {num_values}")
    result: dict[UnitId, dict[str, torch.Tensor]] = {}
    offset = 0
    for unit in units:
        result[unit] = {}
        for name, tensor in sorted(like[unit].items()):
            result[unit][name] = vector[offset : offset + tensor.numel()].view(tensor.shape)
            offset += tensor.numel()
    return result


def digest(tensors: Sequence[torch.Tensor]) -> bytes:
    """SHA-256 over the tensors' bytes; equal exactly when the tensors are equal to the bit."""
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return state.digest()


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # A sum is fifty times faster than a mask of every value; one that overflows says nothing, and is looked into.
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())


def weighted_mean(values: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The mean that a round should give, computed plainly in float64: the reference for tests and reports."""
    weight_sum = sum(weights)
    result = torch.zeros_like(values[0], dtype=torch.float64)
    for value, weight in zip(values, weights, strict=True):
        result += value.double() * (weight / weight_sum)
    return result.float()
