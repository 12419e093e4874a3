"""One unit through a round: what its holder brings in each pass, and what the means of all holders make of it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from averaging.errors import BadTensors
from averaging.merge import UnitTensors, is_finite
from averaging.merging import Merging, UnitView, make_merging, probes
from averaging.outer import OuterConfig, check_outer, outer_step
from averaging.recipe import Recipe
from blocks.spans import UnitId
from blocks.training.moments import ESTIMATES

CONTROL = "control/"
_MOMENT = "moment/"
_STEP_KINDS = ("velocity/", "first/", "second/", "step/")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class UnitInput:
    """What a round reads of one unit: `control` is this peer's own control variate (SCAFFOLD), by tensor name;
    `moments` are what its optimizer knows of the gradients, `TENSOR/mean` and `TENSOR/rms`; none before a step.
    """

    view: UnitView
    control: UnitTensors = field(default_factory=dict)
    moments: UnitTensors = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class UnitResult:
    """What a round makes of one unit, equal to the bit on all its holders, save tensors of another rank under `power`.

    `outer` is the state that the holders agree on besides: the outer optimizer's, the merging rule's, control variates.
    `merged` is what the outer optimizer stepped towards; the same as `tensors` where there is none. `moments` are the
    holders' mean of theirs, which optimizers go on from; they are no part of the state.
    """

    tensors: UnitTensors
    merged: UnitTensors
    outer: UnitTensors
    resets_moments: bool = False
    moments: UnitTensors = field(default_factory=dict)


Shapes = Mapping[UnitId, Mapping[str, tuple[int, ...]]]
"""Of the run's whole adapter: the shape of each tensor, by unit and name."""


class UnitRules:
    """A recipe's rules over single units. `seed`, `rank` and `shapes` are the run's."""

    def __init__(self, recipe: Recipe, *, seed: int = 0, rank: int = 8, shapes: Shapes | None = None) -> None:
        self.recipe = recipe
        self._shapes = shapes or {}
        self.merging: Merging = make_merging(recipe.merging, seed=seed, rank=rank)
        self._outer = OuterConfig(
            name=recipe.outer, learning_rate=recipe.outer_learning_rate, momentum=recipe.outer_momentum
        )
        self._seed = seed

    def frozen(self, names: Iterable[str], number: int) -> frozenset[str]:
        """Tensors that are not trained after the unit's round `number`."""
        return self.merging.frozen(names, number)

    def whole(self, unit: UnitInput) -> UnitInput:
        """The unit as a change from nothing: what groups bring that hold different states (grouping.py)."""
        view = unit.view
        frozen = self.frozen(view.live, view.round)
        start = {name: t if name in frozen else torch.zeros_like(t) for name, t in view.live.items()}
        return replace(unit, view=replace(view, anchor=start))

    def bring(self, unit: UnitInput, means: Sequence[UnitTensors]) -> dict[str, torch.Tensor]:
        """What goes into the weighted mean of pass `len(means)`, by name."""
        brought = self.merging.bring(unit.view, means)
        if not means and self.recipe.local == "scaffold":
            for name, live in unit.view.live.items():  # all of them, though some may not have been stepped yet
                agreed = unit.view.outer.get(CONTROL + name, torch.zeros_like(live))
                brought[CONTROL + name] = unit.control.get(name, agreed) - agreed
        if not means and self.recipe.moments == "mean":
            for name in sorted(set(unit.view.live) - self.frozen(unit.view.live, unit.view.round)):
                for kind in ESTIMATES:
                    none = torch.zeros_like(unit.view.live[name])
                    brought[f"{_MOMENT}{name}/{kind}"] = unit.moments.get(f"{name}/{kind}", none)
        return brought

    def nothing(self, unit: UnitId, number: int) -> dict[str, torch.Tensor]:
        """What a holder of `unit`, last averaged in round `number`, would bring first if it had learnt nothing.

        For who reduces a unit without holding it, under rules of one pass.

        Raises:
            BadTensors: the run has no such unit, or its rules of merging need more of a unit than its shapes.
        """
        shapes = self._shapes.get(unit)
        if not shapes or self.merging.passes > 1:
            raise BadTensors(f"{unit} cannot be reduced here without being held")
        zeros = {name: torch.zeros(shape) for name, shape in shapes.items()}
        view = UnitView(unit=unit, round=number, live=zeros, anchor=zeros, outer={}, scaling=1.0)
        return self.bring(UnitInput(view=view), [])

    def finish(self, unit: UnitInput, means: Sequence[UnitTensors]) -> UnitResult:
        """The unit's new values and agreed state, once all passes are through."""
        view = unit.view
        merged = self.merging.merge(view, [_of_adapter(mean) for mean in means])
        trained = set(view.live) - self.frozen(view.live, view.round)
        before = {name: tensor for name, tensor in view.outer.items() if name.startswith(_STEP_KINDS)}
        tensors, state = outer_step(self._outer, view.anchor, merged.tensors, before, sorted(trained))
        control = {
            key: view.outer[key] + change if key in view.outer else change
            for key, change in means[0].items()
            if key.startswith(CONTROL)
        }
        return UnitResult(
            tensors=tensors,
            merged=merged.tensors,
            outer={**merged.outer, **state, **control},
            resets_moments=merged.resets_moments,
            moments={key.removeprefix(_MOMENT): mean for key, mean in means[0].items() if key.startswith(_MOMENT)},
        )

    def probes(self, tensors: UnitTensors, scaling: float, number: int) -> torch.Tensor:
        """A unit's products seen through round `number`'s random pairs of vectors (merging.probes)."""
        pairs = {name: tensor for name, tensor in tensors.items() if name.endswith((".lora_A", ".lora_B"))}
        return probes(pairs, scaling, seed=self._seed, number=number)


def _of_adapter(mean: UnitTensors) -> Mapping[str, torch.Tensor]:
    return {name: tensor for name, tensor in mean.items() if not name.startswith((CONTROL, _MOMENT))}


def check_outer_state(outer: UnitTensors, tensors: UnitTensors) -> None:
    """Refuse a unit's agreed state, as another holder sends it, that cannot belong to `tensors`.

    Raises:
        BadTensors: a name is not known, or a shape, dtype or value cannot be.
    """
    check_outer({name: tensor for name, tensor in outer.items() if name.startswith(_STEP_KINDS)}, tensors)
    for name, tensor in outer.items():
        kind, _, rest = name.partition("/")
        if name.startswith(_STEP_KINDS):
            continue
        like = tensors.get(rest if kind == "control" else f"{rest}.lora_A")
        if kind not in ("control", "basis") or like is None or tensor.dtype != torch.float32:
            raise BadTensors(f"agreed state '{name[:80]}' belongs to no tensor of the unit")
        fits = tensor.shape == like.shape
        if kind == "basis":
            num_out = tensors[f"{rest}.lora_B"].shape[0] if f"{rest}.lora_B" in tensors else 0
            fits = tensor.shape == (like.shape[1], min(*like.shape, num_out))
        if not fits or not is_finite(tensor):
            raise BadTensors(f"agreed state '{name[:80]}' of shape {tuple(tensor.shape)} does not fit the unit")
