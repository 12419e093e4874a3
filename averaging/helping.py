"""What a peer brings to classes that it only reduces for: their holders are behind NAT, and it can be called. Pure."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from averaging import merge
from averaging.errors import BadTensors
from averaging.exchange import ClassWork, Group, UnitClass
from averaging.planning import Plan
from averaging.unit_round import UnitRules
from blocks.spans import UnitId

logger = logging.getLogger(__name__)


def helped_work(group: Group, plan: Plan, rules: UnitRules) -> list[ClassWork]:
    """One entry for each class of `plan.helped`. A class that is not of this run's adapter is refused to its holders.

    What a lossy codec keeps back of a helper's sums is not owed to anybody: the next round has other helpers.
    """
    numbers = {
        (entry.peer, unit): brought.version.number
        for entry in group.contributions
        for unit, brought in entry.units.items()
    }
    return [
        _entry(unit_class, {unit: numbers[unit_class.holders[0], unit] for unit in unit_class.units}, plan, rules)
        for unit_class in plan.helped
    ]


def _entry(unit_class: UnitClass, numbers: Mapping[UnitId, int], plan: Plan, rules: UnitRules) -> ClassWork:
    try:
        zeros = {unit: rules.nothing(unit, number) for unit, number in numbers.items()}
    except BadTensors as error:
        logger.warning("no help for units=%d reason=%s", len(unit_class.units), error)
        return ClassWork(unit_class=unit_class, vector=None)
    return ClassWork(
        unit_class=unit_class,
        vector=merge.flatten(unit_class.units, zeros),
        segments=merge.segments(unit_class.units, zeros, plan.shares),
    )
