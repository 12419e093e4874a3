"""A holder's units: what stands since their last round, what is trained of it, and what a round reads and writes.

All methods belong where parameters may be read and written. When they are called is for `host.py`, `own_loops.units`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from averaging.errors import BadTensors
from averaging.merging import UnitView
from averaging.unit_round import CONTROL, UnitInput, UnitResult, UnitRules, check_outer_state
from blocks.adapters import (
    LoraSettings,
    UnitParameters,
    UnitTensors,
    at_rank,
    check_unit,
    read_parameters,
    shapes_at,
    unit_digest,
    write_parameters,
)
from blocks.errors import BadAdapter
from blocks.first_values import first_units
from blocks.spans import UnitId
from blocks.training.ledger import Counted
from blocks.training.local_rules import UnitTerms
from blocks.training.moments import parse_moments
from blocks.unit_state import UnitState, agreed


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundResult:
    """What a round changes at one host: new states, the samples behind each, and what of those was its own.

    `read` is what the round read of each unit where training went on meanwhile: what was learnt since is kept on top.
    """

    number: int
    applied: Mapping[UnitId, UnitResult]
    samples: Mapping[UnitId, float]
    counted: Mapping[UnitId, Counted]
    read: Mapping[UnitId, UnitInput] | None = None


def check_state(state: UnitState, shapes: Mapping[UnitId, Mapping[str, tuple[int, ...]]]) -> None:
    """Refuse a unit's state from outside that does not fit the run, whose units have these `shapes`.

    Raises:
        BadAdapter: the unit is not known, or its tensors, agreed state or moments do not fit.
    """
    if state.unit not in shapes:
        raise BadAdapter(f"unit {state.unit} is not one of this run's")
    check_unit(state.unit, state.tensors, shapes[state.unit])
    try:
        check_outer_state(state.outer, state.tensors)
    except BadTensors as error:
        raise BadAdapter(f"{state.unit}: {error}") from error
    odd = {name.rpartition("/")[0] for name in state.moments} - set(state.tensors)
    if odd:
        raise BadAdapter(f"{state.unit} has optimizer state of '{min(odd)[:80]}', which it does not have")
    parse_moments(state.tensors, state.moments)


class LocalSteps(Protocol):
    """Whoever makes the optimizer steps; implemented by blocks.training.unit_steps.UnitSteps."""

    @property
    def terms(self) -> Mapping[UnitId, UnitTerms]:
        """The local rule of each unit."""

    def write_moments(self, moments: Mapping[UnitId, UnitTensors]) -> None:
        """Take another holder's optimizer state of some units; BadAdapter where some does not fit."""

    def reset_moments(self, units: Iterable[UnitId]) -> None:
        """Forget the optimizer state of some units."""

    def estimates(self, unit: UnitId) -> Mapping[str, torch.Tensor]:
        """What one unit's optimizer state says of its gradients (blocks.training.moments); empty before a step."""

    def take_estimates(self, estimates: Mapping[UnitId, UnitTensors]) -> None:
        """Go on from the holders' mean of them, for some units."""


class UnitBook:
    """The units that `parameters` are the trained tensors of, wherever these live."""

    def __init__(self, parameters: UnitParameters, settings: LoraSettings, steps: LocalSteps, rules: UnitRules) -> None:
        self._parameters, self._settings, self._steps, self._rules = parameters, settings, steps, rules
        self._shapes = shapes_at(parameters, settings.rank)
        self._controls: dict[UnitId, UnitTensors] = {}
        self.states: dict[UnitId, UnitState] = {}

    def begin(self) -> None:
        """Every unit as the run's seed makes it."""
        for unit, tensors in first_units(self._shapes, self._settings.seed).items():
            digest = unit_digest(tensors)
            self.states[unit] = UnitState(
                unit=unit, round=0, weight=0.0, total_samples=0, digest=digest, tensors=tensors
            )
            self._restart(unit)

    def take(self, states: Mapping[UnitId, UnitState], staying: Collection[UnitId] = ()) -> None:
        """Put other holders' states, or a checkpoint's, in place of what is here; moments where they came along. What
        was trained of `staying` units since their last round stays on top.

        Raises:
            BadAdapter: a unit is not held, or its tensors, agreed state or moments do not fit; nothing was changed.
        """
        for unit, state in states.items():
            if unit not in self._shapes:
                raise BadAdapter(f"unit {unit} is not held here")
            check_unit(unit, state.tensors, self._shapes[unit])
            try:
                check_outer_state(state.outer, state.tensors)
            except BadTensors as error:
                raise BadAdapter(f"{unit}: {error}") from error
        if not self._settings.own_rank:  # moments of another rank mean nothing here
            self._steps.write_moments({unit: state.moments for unit, state in states.items()})
        lives = {unit: state.tensors for unit, state in states.items()}
        current = read_parameters(self._parameters) if staying else {}
        for unit in staying:
            before = self.states[unit].tensors
            lives[unit] = {name: t + (current[unit][name] - before[name]) for name, t in lives[unit].items()}
        self._write(lives)
        for unit, state in states.items():
            self.states[unit] = replace(state, moments={})
            self._restart(unit)

    def fold(self, units: Mapping[UnitId, Counted]) -> None:
        """Make what was trained of some units since their last round their state: a newer version of the same round.

        It belongs to the end of a sole holder. A host that trains a rank of its own has not the run's tensors: its
        units stay as they are.
        """
        if self._settings.own_rank:
            return
        live = read_parameters(self._parameters)
        for unit, counted in units.items():
            state = self.states[unit]
            self.states[unit] = replace(
                state,
                weight=state.weight + counted.samples,
                total_samples=state.total_samples + counted.samples,
                digest=unit_digest(agreed(live[unit], state.outer)),
                tensors=live[unit],
            )
            self._restart(unit)

    def is_as_agreed(self) -> bool:
        """Whether every parameter is as its unit's state says, as far as its dtype can; nothing was trained on top."""
        for unit, named in self._parameters.items():
            agreed_tensors = self.states[unit].tensors
            for name, parameter in named.items():
                if not torch.equal(parameter.detach().cpu(), agreed_tensors[name].to(parameter.dtype)):
                    return False
        return True

    def inputs(self) -> dict[UnitId, UnitInput]:
        """What a round reads: copies of what is trained, fp32 on the CPU, beside what it began from."""
        found = {}
        for unit, live in read_parameters(self._parameters).items():
            state = self.states[unit]
            control = self._steps.terms[unit].control()
            self._controls[unit] = control
            view = UnitView(
                unit=unit,
                round=state.round,
                live=live,
                anchor=state.tensors,
                outer=state.outer,
                scaling=self._settings.scaling,
            )
            moments = self._steps.estimates(unit) if self._rules.recipe.moments == "mean" else {}
            found[unit] = UnitInput(view=view, control=control, moments=moments)
        return found

    def apply(self, result: RoundResult) -> None:
        """Take a round's result for some units; the others stay as they are."""
        current = read_parameters(self._parameters) if result.read is not None else {}
        lives: dict[UnitId, UnitTensors] = {}
        for unit, done in result.applied.items():
            lives[unit] = done.tensors
            if result.read is not None:
                before = result.read[unit].view.live
                lives[unit] = {name: t + (current[unit][name] - before[name]) for name, t in done.tensors.items()}
        self._write(lives)
        self._steps.reset_moments(unit for unit, done in result.applied.items() if done.resets_moments)
        self._steps.take_estimates({unit: done.moments for unit, done in result.applied.items() if done.moments})
        for unit, done in result.applied.items():
            samples = result.samples[unit]
            self.states[unit] = UnitState(
                unit=unit,
                round=result.number,
                weight=samples,
                total_samples=self.states[unit].total_samples + round(samples),
                digest=unit_digest(agreed(done.tensors, done.outer)),
                tensors=done.tensors,
                outer=done.outer,
            )
            self._restart(unit, self._controls.get(unit))

    def _write(self, units: Mapping[UnitId, UnitTensors]) -> None:
        rank = self._settings.live_rank
        write_parameters(self._parameters, {unit: at_rank(tensors, rank) for unit, tensors in units.items()})

    def _restart(self, unit: UnitId, own: UnitTensors | None = None) -> None:
        """The unit's local rule begins anew from its state."""
        state = self.states[unit]
        anchor = at_rank(state.tensors, self._settings.live_rank)
        agreed_control = {
            name.removeprefix(CONTROL): tensor for name, tensor in state.outer.items() if name.startswith(CONTROL)
        }
        self._steps.terms[unit].begin(
            anchor, frozen=self._rules.frozen(anchor, state.round), agreed=agreed_control, own=own
        )
