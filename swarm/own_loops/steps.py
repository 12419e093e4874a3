"""The optimizer steps of somebody else's training loop, as a run's rules see them: its gradients before each step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch.optim import Optimizer

from averaging.recipe import Recipe
from blocks.adapters import UnitParameters, UnitTensors
from blocks.spans import UnitId
from blocks.training.local_rules import LocalRule, UnitTerms
from blocks.training.moments import MOMENTS, STEP, from_estimates, parse_moments, to_estimates
from swarm.errors import BadConfig

_ADAMS = (torch.optim.Adam, torch.optim.AdamW)


class OwnSteps:
    """Implements unit_book.LocalSteps for parameters that an optimizer of the loop's own steps on.

    The run's local rule is applied to the gradients as they are just before a step; where the loop clips them, after
    that. The optimizer's moments stay its own, also where it takes another holder's state; a round may average them.
    """

    def __init__(self, parameters: UnitParameters, rule: LocalRule, recipe: Recipe) -> None:
        self.optimizer: Optimizer | None = None
        self._parameters, self._averages_moments = parameters, recipe.moments == "mean"
        self._terms = {unit: UnitTerms(rule) for unit in parameters}
        self._changes_gradients = rule != LocalRule() or recipe.merging in ("ffa", "rolora")

    @property
    def terms(self) -> Mapping[UnitId, UnitTerms]:
        """See LocalSteps."""
        return self._terms

    def check(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer that the run's rounds cannot work with.

        Raises:
            BadConfig: rounds average AdamW's moments, and it has none.
        """
        if self._averages_moments and not isinstance(optimizer, _ADAMS):
            raise BadConfig(
                f"this run's rounds average Adam's moments (rounds.moments = 'mean'), and {type(optimizer).__name__} "
                f"has none; train with torch.optim.AdamW"
            )

    def estimates(self, unit: UnitId) -> dict[str, torch.Tensor]:
        """See LocalSteps."""
        found: dict[str, torch.Tensor] = {}
        for name, (moments, betas) in self._moments(unit).items():
            found |= to_estimates({name: moments}, betas)
        return found

    def take_estimates(self, estimates: Mapping[UnitId, UnitTensors]) -> None:
        """See LocalSteps. What was not stepped yet begins anew: only the optimizer knows what belongs to its state."""
        for unit, found in estimates.items():
            for name, (before, betas) in self._moments(unit).items():
                named = {name: self._parameters[unit][name]}
                for moments in from_estimates(named, found, {name: before}, betas).values():
                    for key in MOMENTS:
                        before[key].copy_(moments[key])  # in place: a captured graph steps on this memory

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

    def _moments(self, unit: UnitId) -> dict[str, tuple[dict[str, torch.Tensor], tuple[float, float]]]:
        """The optimizer's own tensors, and the betas that they are made with, of what was stepped of a unit."""
        optimizer = self.optimizer
        if optimizer is None:
            return {}
        betas = {each: group["betas"] for group in optimizer.param_groups for each in group["params"]}
        return {
            name: ({key: optimizer.state[parameter][key] for key in (*MOMENTS, STEP)}, betas[parameter])
            for name, parameter in self._parameters[unit].items()
            if optimizer.state.get(parameter)
        }
