"""A host's units: what stands since their last round, what is trained of it, and what a round reads and writes.

All methods belong in the compute thread. When they are called is for `host.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from averaging.errors import BadTensors
from averaging.merging import UnitView
from averaging.unit_round import CONTROL, UnitInput, UnitResult, UnitRules, check_outer_state
from blocks.adapters import (
    UnitTensors,
    at_rank,
    check_unit,
    first_units,
    read_units,
    settings_of,
    unit_digest,
    unit_shapes,
    write_units,
)
from blocks.errors import BadAdapter
from blocks.ledger import Counted
from blocks.load import SpanModel
from blocks.optimizer import parse_moments
from blocks.spans import UnitId
from blocks.unit_state import UnitState, agreed
from blocks.unit_steps import UnitSteps


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


class UnitBook:
    """The units of one span."""

    def __init__(self, model: SpanModel, steps: UnitSteps, rules: UnitRules) -> None:
        self._model, self._steps, self._rules = model, steps, rules
        self._settings = settings_of(model)
        self._controls: dict[UnitId, UnitTensors] = {}
        self.states: dict[UnitId, UnitState] = {}

    def begin(self) -> None:
        """Every unit as the run's seed makes it."""
        for unit, tensors in first_units(self._model).items():
            digest = unit_digest(tensors)
            self.states[unit] = UnitState(
                unit=unit, round=0, weight=0.0, total_samples=0, digest=digest, tensors=tensors
            )
            self._restart(unit)

    def take(self, states: Mapping[UnitId, UnitState]) -> None:
        """Put other holders' states, or a checkpoint's, in place of what is here; moments where they came along.

        Raises:
            BadAdapter: a unit is not held, or its tensors, agreed state or moments do not fit; nothing was changed.
        """
        shapes = unit_shapes(self._model)
        for unit, state in states.items():
            if unit not in shapes:
                raise BadAdapter(f"unit {unit} is not in the span {self._model.span}")
            check_unit(unit, state.tensors, shapes[unit])
            try:
                check_outer_state(state.outer, state.tensors)
            except BadTensors as error:
                raise BadAdapter(f"{unit}: {error}") from error
        if not self._settings.own_rank:  # moments of another rank mean nothing here
            self._steps.write_moments({unit: state.moments for unit, state in states.items()})
        self._write({unit: state.tensors for unit, state in states.items()})
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
        live = read_units(self._model)
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

    def inputs(self) -> dict[UnitId, UnitInput]:
        """What a round reads: copies of what is trained, fp32 on the CPU, beside what it began from."""
        found = {}
        for unit, live in read_units(self._model).items():
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
            found[unit] = UnitInput(view=view, control=control)
        return found

    def apply(self, result: RoundResult) -> None:
        """Take a round's result for some units; the others stay as they are."""
        current = read_units(self._model) if result.read is not None else {}
        lives: dict[UnitId, UnitTensors] = {}
        for unit, done in result.applied.items():
            lives[unit] = done.tensors
            if result.read is not None:
                before = result.read[unit].view.live
                lives[unit] = {name: t + (current[unit][name] - before[name]) for name, t in done.tensors.items()}
        self._write(lives)
        self._steps.reset_moments(unit for unit, done in result.applied.items() if done.resets_moments)
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
        write_units(self._model, {unit: at_rank(tensors, rank) for unit, tensors in units.items()})

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
