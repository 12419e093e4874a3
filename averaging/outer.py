"""Steps of the outer optimizer on what a round merged. Pure; which rule merged is not its business.

The pseudo-gradient is the anchor minus what was merged. Anchor, merged tensors and state are equal on all holders, and
every operation here is elementwise and rounded on its own (a fused multiply-add would round once where another machine
rounds twice), so that the result is equal to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from averaging.errors import BadTensors
from averaging.merge import UnitTensors, is_finite
from averaging.recipe import OUTERS

_SECOND_BETA = 0.99
_MAX_STEPS = 2.0**24  # up to here fp32 counts without gaps


@dataclass(frozen=True, kw_only=True, slots=True)
class OuterConfig:
    """Which outer optimizer, and how fast.

    `learning_rate` fits `nesterov`; `adam` steps by about that much in every element, so give it 0.001 or so.
    `momentum` is Adam's first beta too (its second is 0.99), `tau` is what Adam adds to the root of the second moment.

    Raises:
        ValueError: a value cannot be.
    """

    name: str = "none"
    learning_rate: float = 0.7
    momentum: float = 0.9
    tau: float = 1e-8

    def __post_init__(self) -> None:
        if self.name not in OUTERS:
            raise ValueError(f"'{self.name}' is not an outer optimizer; use one of {', '.join(OUTERS)}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"the outer learning rate is {self.learning_rate}; it must be above 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"the outer momentum is {self.momentum}; it must be at least 0 and below 1")
        if not (math.isfinite(self.tau) and self.tau > 0):
            raise ValueError(f"the outer tau is {self.tau}; it must be above 0")


def outer_step(
    config: OuterConfig, anchor: UnitTensors, merged: UnitTensors, state: UnitTensors, names: Iterable[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The unit after the outer step, and the state after it; nothing that is given is changed.

    Only `names`, the tensors trained since the last round, move and have state; the others are taken from `merged`,
    and their state is kept. All are fp32 on the CPU; a state's shape is its tensor's, but `step/{name}` is [1].

    `nesterov` is DiLoCo's (2311.08105), defined as torch's SGD with Nesterov momentum. `adam` is FedAdam (Reddi et
    al., 2003.00295), where tau takes epsilon's place, with Adam's correction of the moments' bias, which they leave
    out.
    """
    if config.name == "none":
        return dict(merged), dict(state)
    tensors = {name: tensor.clone() for name, tensor in merged.items()}
    after = dict(state)
    step = _nesterov if config.name == "nesterov" else _adam
    for name in sorted(set(names)):
        move, moved = step(config, name, anchor[name] - merged[name], state)
        tensors[name] = anchor[name] - move * config.learning_rate
        after |= moved
    return tensors, after


def check_outer(state: UnitTensors, like: UnitTensors) -> None:
    """Refuse outer state from another peer that cannot belong to a unit with tensors such as `like`.

    What is plausible but wrong passes: a newcomer compares its hash with that of the other holders.

    Raises:
        BadTensors: a name, shape or dtype is not known, a value is not finite, a second moment is negative, a count is
            not a whole number, or Adam's three parts do not come together.
    """
    for key, tensor in state.items():
        kind, _, name = key.partition("/")
        if kind not in ("velocity", "first", "second", "step") or name not in like:
            raise BadTensors(f"outer state '{key[:80]}' belongs to no tensor of the unit")
        shape = torch.Size([1]) if kind == "step" else like[name].shape
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or tensor.shape != shape:
            raise BadTensors(
                f"outer state '{key}' is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; "
                f"it must be torch.float32 {tuple(shape)} on cpu"
            )
        if not is_finite(tensor):
            raise BadTensors(f"outer state '{key}' holds values that are not finite")
        if kind == "second" and bool((tensor < 0).any()):
            raise BadTensors(f"outer state '{key}' holds negative second moments")
        if kind == "step" and not (1 <= float(tensor) <= _MAX_STEPS and float(tensor).is_integer()):
            raise BadTensors(f"outer state '{key}' is {float(tensor)}; it must be a whole number from 1")
        if kind != "velocity" and not all(f"{part}/{name}" in state for part in ("first", "second", "step")):
            raise BadTensors(f"outer state '{key}' comes without the rest of Adam's state for {name}")


def _nesterov(config: OuterConfig, name: str, gradient: Tensor, state: UnitTensors) -> tuple[Tensor, dict[str, Tensor]]:
    velocity = _or_zero(state, f"velocity/{name}", gradient) * config.momentum + gradient
    return gradient + velocity * config.momentum, {f"velocity/{name}": velocity}


def _adam(config: OuterConfig, name: str, gradient: Tensor, state: UnitTensors) -> tuple[Tensor, dict[str, Tensor]]:
    first = _or_zero(state, f"first/{name}", gradient) * config.momentum + gradient * (1 - config.momentum)
    second = _or_zero(state, f"second/{name}", gradient) * _SECOND_BETA + gradient * gradient * (1 - _SECOND_BETA)
    # Past the last whole number of fp32 the count stands still, long after the corrections have become 1.
    count = min(float(_or_zero(state, f"step/{name}", torch.zeros(1))) + 1, _MAX_STEPS)
    unbiased_first = first / (1 - _power(config.momentum, int(count)))
    unbiased_second = second / (1 - _power(_SECOND_BETA, int(count)))
    parts = {f"first/{name}": first, f"second/{name}": second, f"step/{name}": torch.tensor([count])}
    return unbiased_first / (unbiased_second.sqrt() + config.tau), parts


def _or_zero(state: UnitTensors, key: str, like: Tensor) -> Tensor:
    found = state.get(key)
    return torch.zeros_like(like) if found is None else found


def _power(base: float, exponent: int) -> float:
    """By multiplication alone, since a C library's `pow` may round otherwise on another machine."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result
