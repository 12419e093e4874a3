"""The optimizer steps of somebody else's training loop, as a run's rules see them: its gradients before each step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch.optim import Optimizer

from averaging.recipe import Recipe
from blocks.adapters import UnitParameters, UnitTensors
from blocks.spans import UnitId
from blocks.training.local_rules import LocalRule, UnitTerms
from blocks.training.moments import BETAS, MOMENTS, STEP, Moments, from_estimates, parse_moments, to_estimates
from swarm.errors import BadConfig

_ADAMS = (torch.optim.Adam, torch.optim.AdamW)


class OwnSteps:
    """Implements unit_book.LocalSteps for parameters that an optimizer of the loop's own steps on.

    The run's local rule is applied to the gradients as they are just before a step; where the loop clips them, after
    that. The optimizer's moments stay its own, unless rounds average them: those of other holders are checked and left.
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

    def begin(self, optimizer: Optimizer) -> None:
        """From here on `optimizer` makes the steps.

        Raises:
            BadConfig: rounds average AdamW's moments, and this is another optimizer.
        """
        if self._averages_moments and not isinstance(optimizer, _ADAMS):
            raise BadConfig(
                f"this run's rounds average Adam's moments (rounds.moments = 'mean'), and {type(optimizer).__name__} "
                f"has none; train with torch.optim.AdamW"
            )
        self.optimizer = optimizer

    def estimates(self, unit: UnitId) -> dict[str, torch.Tensor]:
        """See LocalSteps."""
        if self.optimizer is None:
            return {}
        return to_estimates(self._moments(unit), self._betas)

    def take_estimates(self, estimates: Mapping[UnitId, UnitTensors]) -> None:
        """See LocalSteps. What was not stepped yet begins anew: only the optimizer knows what belongs to its state."""
        if self.optimizer is None:
            return
        for unit, found in estimates.items():
            named, before = self._parameters[unit], self._moments(unit)
            stepped = {name: named[name] for name in before}
            for name, moments in from_estimates(stepped, found, before, self._betas).items():
                self.optimizer.state[named[name]].update(moments)

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

    def _moments(self, unit: UnitId) -> Moments:
        """Of those parameters of a unit that were stepped."""
        if self.optimizer is None:
            return {}
        state = self.optimizer.state
        return {
            name: {key: state[parameter][key] for key in (*MOMENTS, STEP)}
            for name, parameter in self._parameters[unit].items()
            if state.get(parameter)
        }

    @property
    def _betas(self) -> tuple[float, float]:
        if self.optimizer is None:
            return BETAS
        first, second = self.optimizer.defaults["betas"]
        return float(first), float(second)
