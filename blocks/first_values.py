"""How an adapter starts: the first value of each of its tensors, the same on every machine, whatever else it holds."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from blocks.spans import UnitId


def initial_tensor(seed: int, unit: UnitId, name: str, shape: tuple[int, ...]) -> Tensor:
    """The first value of one adapter tensor, fp32 on the CPU: the same on every machine, whatever else it holds.

    `lora_B` is zero. `lora_A` is uniform with peft's bound, kaiming with a=sqrt(5), which is 1/sqrt(fan-in); its bits
    come from Philox (Salmon et al. 2011) keyed by seed, unit and name, whose raw stream numpy promises never to change.
    """
    if name.endswith("lora_B"):
        return torch.zeros(shape, dtype=torch.float32)
    key = hashlib.sha256(f"{seed}:{unit}:{name}".encode()).digest()
    raw = np.random.Philox(key=int.from_bytes(key[:16], "little")).random_raw(math.prod(shape))
    unit_interval = (np.asarray(raw, dtype=np.uint64) >> np.uint64(40)).astype(np.float64) / 2.0**24
    bound = 1.0 / math.sqrt(shape[1])
    return torch.from_numpy(((2.0 * unit_interval - 1.0) * bound).astype(np.float32)).reshape(shape)


def first_units(shapes: Mapping[UnitId, Mapping[str, tuple[int, ...]]], seed: int) -> dict[UnitId, dict[str, Tensor]]:
    """Units of these shapes as the run's seed makes them."""
    return {
        unit: {name: initial_tensor(seed, unit, name, shape) for name, shape in named.items()}
        for unit, named in shapes.items()
    }
