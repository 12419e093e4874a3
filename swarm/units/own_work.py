"""Whose work since its last round may go on when another holder's newer state takes the place of a unit. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from averaging.averager import RoundOutcome
from averaging.recipe import Recipe
from blocks.spans import UnitId

MOST_CARRIED = 4  # in a row: work that missed so many states would lead away from what the others agree on


class OwnWork:
    """What became of one host's work on its units, as far as it knows.

    A host that was paused, asleep or cut off misses rounds, and what it had trained for them is worth as much in the
    next one. But not where a round had that work and its end is not known here, as when the others' votes did not come:
    they may have counted it. Nor under rules by which it means nothing on another state.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._can_carry = recipe.can_carry
        self._unsure: frozenset[UnitId] = frozenset()
        self._carried: dict[UnitId, int] = {}

    def came_of(self, outcome: RoundOutcome) -> None:
        """A round with others, or alone, is over."""
        for unit in outcome.applied:
            self._carried.pop(unit, None)
        self._unsure -= outcome.applied.keys()
        if len(outcome.peers) > 1 and not outcome.behind:  # who is behind is left out, and so is who has a stale state
            self._unsure |= outcome.kept.keys() - outcome.stale

    def staying(self, units: Iterable[UnitId]) -> frozenset[UnitId]:
        """Of some units that are about to be replaced those whose work stays on top."""
        if not self._can_carry:
            return frozenset()
        return frozenset(
            unit for unit in units if unit not in self._unsure and self._carried.get(unit, 0) < MOST_CARRIED
        )

    def replaced(self, units: Iterable[UnitId], staying: frozenset[UnitId]) -> None:
        """They were; the work on those that are not `staying` is gone."""
        for unit in units:
            if unit in staying:
                self._carried[unit] = self._carried.get(unit, 0) + 1
            else:
                self._carried.pop(unit, None)
                self._unsure -= {unit}
