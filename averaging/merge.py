"""Tensor maths of a round: one flat vector per class and back, the digest of a result, and the mean as a reference.

All tensors are fp32 on the CPU. The all-reduce only sums, so that each sender scales by its own share before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch

from averaging.errors import BadTensors
from blocks.spans import UnitId

UnitTensors = Mapping[str, torch.Tensor]
"""One unit's tensors by name: fp32 on the CPU."""


def flatten(
    units: Sequence[UnitId], tensors: Mapping[UnitId, UnitTensors], shares: Mapping[UnitId, float]
) -> torch.Tensor:
    """The class's vector: units in the given order, their tensors by name, each times its unit's share.

    Raises:
        BadTensors: a unit is missing, empty, not fp32 on the CPU, or not finite.
    """
    pieces = []
    for unit in units:
        for name, tensor in sorted(_own(unit, tensors).items()):
            if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
                raise BadTensors(f"{unit} {name} is {tensor.dtype} on {tensor.device}; rounds take float32 on the CPU")
            # A share of 0 must give 0 even for values that would overflow, and finite values are checked all the same.
            pieces.append(tensor.detach().reshape(-1) * shares[unit])
    vector = torch.cat(pieces)
    if not is_finite(vector):
        raise BadTensors(f"units {units[0]} to {units[-1]} hold values that are not finite; the step has diverged")
    return vector


def unflatten(
    vector: torch.Tensor, units: Sequence[UnitId], like: Mapping[UnitId, UnitTensors]
) -> dict[UnitId, dict[str, torch.Tensor]]:
    """The inverse of `flatten` without the scaling: views of `vector`, with the shapes of `like`."""
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


def total(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum, in the given order, so that the result does not depend on who came first."""
    result = pieces[0].clone()
    for piece in pieces[1:]:
        result.add_(piece)
    return result


def digest(tensors: Sequence[torch.Tensor]) -> bytes:
    """SHA-256 over the tensors' bytes; equal exactly when the tensors are equal to the bit."""
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return state.digest()


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    return bool(torch.isfinite(tensor).all())


def weighted_mean(values: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The mean that a round should give, computed plainly in float64: the reference for tests and reports."""
    weight_sum = sum(weights)
    result = torch.zeros_like(values[0], dtype=torch.float64)
    for value, weight in zip(values, weights, strict=True):
        result += value.double() * (weight / weight_sum)
    return result.float()


def _own(unit: UnitId, tensors: Mapping[UnitId, UnitTensors]) -> UnitTensors:
    found = tensors.get(unit)
    if not found:
        raise BadTensors(f"{unit} was announced for the round but is not held any more")
    return found
