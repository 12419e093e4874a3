"""One AdamW per unit (Loshchilov and Hutter, 1711.05101) and the run's learning-rate schedule over samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim.adamw import adamw

from blocks.training.local_rules import LocalRule
from blocks.training.moments import (
    BETAS,
    MOMENTS,
    STEP,
    Moments,
    from_estimates,
    no_moments,
    parse_moments,
    to_estimates,
)

_EPSILON = 1e-8  # AdamW's usual one


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW and its schedule. Samples, not steps, are the clock: all peers of a run see the same one.

    `schedule` is constant, linear (to zero at `total_samples`) or cosine (likewise). `clip_norm` bounds the norm of
    each *unit's* gradient, so that it does not depend on which host holds what; 0 is off. `local` is what the run's
    rounds add to gradients before that.
    """

    learning_rate: float = 2e-4
    warmup_samples: int = 0
    total_samples: int = 0
    schedule: str = "constant"
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    local: LocalRule = field(default_factory=LocalRule)

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"training.schedule is '{self.schedule}'; use constant, linear or cosine")
        if self.schedule != "constant" and self.total_samples <= self.warmup_samples:
            raise ValueError(
                f"training.total_samples is {self.total_samples}; a {self.schedule} schedule needs more than "
                f"training.warmup_samples ({self.warmup_samples})"
            )


def learning_rate(config: OptimizerConfig, samples: int) -> float:
    """The rate for the step that begins when `samples` have been seen by the run."""
    if samples < config.warmup_samples:
        return config.learning_rate * (samples + 1) / config.warmup_samples
    if config.schedule == "constant":
        return config.learning_rate
    part = min(1.0, (samples - config.warmup_samples) / (config.total_samples - config.warmup_samples))
    if config.schedule == "linear":
        return config.learning_rate * (1.0 - part)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * part))


class UnitOptimizer:
    """AdamW over the tensors of one unit, whose state can be read and written by tensor name."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> None:
        self._parameters = dict(parameters)
        self._config = config
        self._moments: Moments = {}  # empty before the first step

    def step(self, gradients: Mapping[str, torch.Tensor], *, samples: int) -> float:
        """One step with `gradients` (fp32, already divided by the token count); returns their norm before clipping.

        Nothing changes where that norm is not finite: one overflow would be in the moments for good.
        """
        if not gradients:
            return 0.0
        norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()])))
        if not math.isfinite(norm):
            return norm
        scale = 1.0
        if self._config.clip_norm > 0:
            scale = min(1.0, self._config.clip_norm / (norm + 1e-6))  # torch's clip_grad_norm_ adds the same
        self._apply({name: gradient * scale for name, gradient in gradients.items()}, samples)
        return norm

    def read(self) -> dict[str, torch.Tensor]:
        """Moments by `TENSOR/exp_avg`, `TENSOR/exp_avg_sq` and the step count; fp32 on the CPU. Empty before a step."""
        state: dict[str, torch.Tensor] = {}
        for name in self._parameters:
            moments = self._moments.get(name)
            if moments:
                for moment in MOMENTS:
                    state[f"{name}/{moment}"] = moments[moment].detach().to("cpu", torch.float32, copy=True)
                state[f"{name}/{STEP}"] = torch.tensor([float(moments[STEP])], dtype=torch.float32)
        return state

    def write(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take the moments that `read` gave, here or on another peer.

        Raises:
            BadAdapter: a tensor is missing, misshapen, not finite, or not what AdamW can come to.
        """
        self.take(self.parse(state))

    def parse(self, state: Mapping[str, torch.Tensor]) -> Moments:
        """Check moments from outside, for `take`; nothing changes. Raises as `write` does.

        A tensor that was never stepped has none: rules of rounds may train half of a unit at a time.
        """
        return parse_moments(self._parameters, state)

    def take(self, moments: Moments) -> None:
        """Put parsed moments in place; none leave the state as it is."""
        self._moments.update(moments)

    def reset(self) -> None:
        """Begin anew, as before the first step."""
        self._moments = {}

    def estimates(self) -> dict[str, torch.Tensor]:
        """What the moments say of the gradients, to be averaged with other holders' (moments.to_estimates)."""
        return to_estimates(self._moments)

    def take_estimates(self, estimates: Mapping[str, torch.Tensor]) -> None:
        """Go on from the holders' mean of `estimates`."""
        self._moments.update(from_estimates(self._parameters, estimates, self._moments))

    def _apply(self, gradients: Mapping[str, torch.Tensor], samples: int) -> None:
        """AdamW as a function: the class of it imports torch's compiler, seconds in which a host does nothing else."""
        names = list(gradients)
        parameters: list[torch.Tensor] = [self._parameters[name] for name in names]
        moments = [self._moments.get(name) or no_moments(self._parameters[name]) for name in names]
        with torch.no_grad():
            adamw(
                parameters,
                [gradients[name].to(each.device, each.dtype) for name, each in zip(names, parameters, strict=True)],
                [each["exp_avg"] for each in moments],
                [each["exp_avg_sq"] for each in moments],
                [],
                [each[STEP] for each in moments],
                amsgrad=False,
                beta1=BETAS[0],
                beta2=BETAS[1],
                lr=learning_rate(self._config, samples),
                weight_decay=self._config.weight_decay,
                eps=_EPSILON,
                maximize=False,
            )
        self._moments.update(zip(names, moments, strict=True))


def add_gradients(total: dict[str, torch.Tensor] | None, more: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sum of gradients by tensor name, in place where `total` exists. Shapes as the parameters', fp32."""
    if total is None:
        return {name: tensor.clone() for name, tensor in more.items()}
    for name, tensor in more.items():
        total[name].add_(tensor)
    return total


def divided(gradients: Mapping[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """Gradients of the mean from gradients of the sum over `count` tokens."""
    return {name: tensor / max(1, count) for name, tensor in gradients.items()}
