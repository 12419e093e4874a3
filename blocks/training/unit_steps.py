"""Sums of committed gradients, and one AdamW per unit. All of it lives in the compute thread."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from blocks.spans import UnitId
from blocks.training.local_rules import UnitTerms
from blocks.training.optimizer import OptimizerConfig, UnitOptimizer, add_gradients, divided

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class DueStep:
    """A step of one unit: `tokens` had a label in what was summed, `samples` had been seen by the run before it."""

    unit: UnitId
    tokens: int
    samples: int


class UnitSteps:
    """What was committed and not stepped, and how a step is made. Every method belongs in the compute thread."""

    def __init__(self, parameters: Mapping[UnitId, Mapping[str, nn.Parameter]], config: OptimizerConfig) -> None:
        self._parameters = {unit: dict(named) for unit, named in parameters.items()}
        self.terms = {unit: UnitTerms(config.local) for unit in parameters}
        self._optimizers = {unit: UnitOptimizer(named, config) for unit, named in parameters.items()}
        self._sums: dict[UnitId, dict[str, torch.Tensor] | None] = dict.fromkeys(self._optimizers)

    @property
    def units(self) -> frozenset[UnitId]:
        """The units that are trained here; a block without a module that the LoRA targets has none."""
        return frozenset(self._optimizers)

    def add(self, gradients: Mapping[UnitId, Mapping[str, torch.Tensor]]) -> None:
        """Add committed gradients of summed token losses, fp32."""
        for unit, named in gradients.items():
            self._sums[unit] = add_gradients(self._sums[unit], named)

    def step(self, due: Sequence[DueStep]) -> None:
        """Step these units with what was added, divided by the tokens; what was added is spent."""
        for step in due:
            total, self._sums[step.unit] = self._sums[step.unit], None
            if total is None:
                continue
            gradients = self.terms[step.unit].adjust(self._parameters[step.unit], divided(total, step.tokens))
            norm = self._optimizers[step.unit].step(gradients, samples=step.samples)
            if not math.isfinite(norm):
                logger.warning("step left out: the gradients' sum is not finite unit=%s", step.unit)

    def read_moments(self, units: Iterable[UnitId] | None = None) -> dict[UnitId, dict[str, torch.Tensor]]:
        """Optimizer state of some units, or of all (see UnitOptimizer.read)."""
        return {unit: self._optimizers[unit].read() for unit in (self._optimizers if units is None else units)}

    def reset_moments(self, units: Iterable[UnitId]) -> None:
        """Forget optimizer state that belongs to factors which are no more."""
        for unit in units:
            self._optimizers[unit].reset()

    def estimates(self, unit: UnitId) -> dict[str, torch.Tensor]:
        """What one unit's optimizer state says of its gradients (moments.to_estimates); empty before a step."""
        return self._optimizers[unit].estimates()

    def take_estimates(self, estimates: Mapping[UnitId, Mapping[str, torch.Tensor]]) -> None:
        """Go on from what the holders of some units found in the mean."""
        for unit, found in estimates.items():
            self._optimizers[unit].take_estimates(found)

    def write_moments(self, moments: Mapping[UnitId, Mapping[str, torch.Tensor]]) -> None:
        """Take optimizer state for some units.

        Raises:
            BadAdapter: some state does not fit; nothing was changed.
        """
        parsed = {unit: self._optimizers[unit].parse(state) for unit, state in moments.items()}
        for unit, state in parsed.items():
            self._optimizers[unit].take(state)
