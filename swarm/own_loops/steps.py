"""The optimizer steps of somebody else's training loop, as a run's rules see them: its gradients before each step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch.optim import Optimizer

from averaging.recipe import Recipe
from blocks.adapters import UnitParameters, UnitTensors
from blocks.spans import UnitId
from blocks.training.local_rules import LocalRule, UnitTerms
from blocks.training.optimizer import parse_moments


class OwnSteps:
    """Implements unit_book.LocalSteps for parameters that an optimizer of the loop's own steps on.

    The run's local rule is applied to the gradients as they are just before a step; where the loop clips them, after
    that. The optimizer's moments stay its own: others' are checked and left.
    """

    def __init__(self, parameters: UnitParameters, rule: LocalRule, recipe: Recipe) -> None:
        self.optimizer: Optimizer | None = None
        self._parameters = parameters
        self._terms = {unit: UnitTerms(rule) for unit in parameters}
        self._changes_gradients = rule != LocalRule() or recipe.merging in ("ffa", "rolora")

    @property
    def terms(self) -> Mapping[UnitId, UnitTerms]:
        """See LocalSteps."""
        return self._terms

    def write_moments(self, moments: Mapping[UnitId, UnitTensors]) -> None:
        """See LocalSteps."""
        for unit, state in moments.items():
            parse_moments(self._parameters[unit], state)

    def reset_moments(self, units: Iterable[UnitId]) -> None:
        """See LocalSteps. torch's optimizers begin anew with a parameter of which they have no state."""
        if self.optimizer is None:
            return
        for unit in units:
            for parameter in self._parameters[unit].values():
                self.optimizer.state.pop(parameter, None)

    def adjust(self) -> None:
        """Put the gradients that the run's rules want in place of those that stand there. In the loop's thread."""
        if not self._changes_gradients:
            return
        for unit, named in self._parameters.items():
            gradients = {name: each.grad.float() for name, each in named.items() if each.grad is not None}
            with torch.no_grad():
                wanted = self._terms[unit].adjust(named, gradients)
                for name, parameter in named.items():
                    if parameter.grad is None:
                        continue
                    if name not in wanted:
                        parameter.grad = None  # not trained in this round; the optimizer passes it over
                    else:
                        parameter.grad.copy_(wanted[name])
