"""The tensors of one round at one peer: vectors for the exchange, pass by pass, and what the means make of them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from averaging import merge, rounds
from averaging.errors import BadTensors
from averaging.exchange import ClassWork, Reduced, UnitClass, Vote
from averaging.feedback import Feedback
from averaging.merge import UnitTensors
from averaging.merging import merging_error
from averaging.planning import Plan
from averaging.unit_round import UnitInput, UnitResult, UnitRules
from blocks.spans import UnitId
from peers.network import PeerId

logger = logging.getLogger(__name__)

_ROUNDING = 1e-9  # shares that sum to 1 may do so only nearly

Decisions = Mapping[bytes, rounds.Applied | rounds.Kept]


class RoundWork:
    """What this peer's units go through in one round. All methods are for a worker thread, one at a time."""

    def __init__(self, rules: UnitRules, plan: Plan, inputs: Mapping[UnitId, UnitInput], number: int) -> None:
        self._rules, self._plan, self._inputs, self._number = rules, plan, inputs, number
        self._means: dict[UnitId, list[UnitTensors]] = {unit: [] for unit in inputs}
        self._brought: dict[UnitId, dict[str, torch.Tensor]] = {}
        self._failed: set[bytes] = set()
        self._pass = 0

    def entries(self, feedback: Feedback) -> list[ClassWork]:
        """The next pass of every class. One that cannot be brought has no vector, which tells the others."""
        return [self._entry(entry, feedback) for entry in self._plan.classes]

    def take_means(self, reduced: Mapping[bytes, Reduced]) -> None:
        """What came of the pass."""
        for entry in self._plan.classes:
            result = reduced[entry.class_id]
            if result.mean is None:
                self._failed.add(entry.class_id)
            else:
                for unit, mean in merge.unflatten(result.mean, entry.units, self._brought).items():
                    self._means[unit].append(mean)
        self._pass += 1

    def probes(self, entry: UnitClass) -> bytes:
        """This peer's products in one class, seen through the round's random pairs of vectors; fp32 as bytes."""
        return b"".join(self._probed(unit).numpy().astype("<f4").tobytes() for unit in entry.units if self._has(unit))

    def finish(
        self,
        reduced: Mapping[bytes, Reduced],
        decisions: Decisions,
        votes: Mapping[bytes, Mapping[PeerId, Vote]],
        feedback: Feedback,
    ) -> tuple[dict[UnitId, UnitResult], dict[UnitId, str], float | None]:
        """New states, units kept with the reason, and the merging error over all that was merged with others."""
        feedback.begin()
        applied: dict[UnitId, UnitResult] = {}
        kept = dict(self._plan.kept)
        errors: list[tuple[float, float]] = []
        for unit in self._plan.alone:
            try:
                applied[unit] = self._alone(unit)
            except BadTensors as error:
                kept[unit] = str(error)
        for entry in self._plan.classes:
            result, decision = reduced[entry.class_id], decisions[entry.class_id]
            if not isinstance(decision, rounds.Applied) or result.mean is None:
                why = result.reason or (decision.reason if isinstance(decision, rounds.Kept) else "")
                kept.update(dict.fromkeys(entry.units, why))
                continue
            try:
                states = {unit: self._rules.finish(self._inputs[unit], self._means[unit]) for unit in entry.units}
            except BadTensors as error:  # the others go on; what they come to is fetched
                kept.update(dict.fromkeys(entry.units, str(error)))
                continue
            applied.update(states)
            feedback.settle(entry.units, self._brought, result.owed_sent, result.owed_sum, unheard=self._plan.unheard)
            errors += self._errors(entry, states, votes.get(entry.class_id, {}))
        return applied, kept, _overall(errors)

    def _entry(self, entry: UnitClass, feedback: Feedback) -> ClassWork:
        numbered = entry if not self._pass else replace(entry, class_id=_pass_id(entry.class_id, self._pass))
        if entry.class_id in self._failed:
            return ClassWork(unit_class=numbered, vector=None)
        try:
            merge.check(entry.units, {unit: given.view.live for unit, given in self._inputs.items()})
            for unit in entry.units:
                self._brought[unit] = self._rules.bring(self._inputs[unit], self._means[unit])
            merge.check(entry.units, self._brought)
        except BadTensors as error:
            logger.warning("class not brought units=%d reason=%s", len(entry.units), error)
            return ClassWork(unit_class=numbered, vector=None)
        vector = merge.flatten(entry.units, self._brought)
        owed_sent, owed_sum = feedback.owed(entry.units, self._brought)
        return ClassWork(
            unit_class=numbered,
            vector=vector,
            segments=merge.segments(entry.units, self._brought, self._plan.shares),
            owed_sent=owed_sent,
            owed_sum=owed_sum,
        )

    def _alone(self, unit: UnitId) -> UnitResult:
        """No traffic, but the rules all the same: an outer step is one with a single holder too.

        Raises:
            BadTensors: the unit is not held any more, or its values cannot be averaged.
        """
        merge.check([unit], {unit: self._inputs[unit].view.live} if unit in self._inputs else {})
        share = self._plan.shares[unit][0]
        means: list[UnitTensors] = []
        for _ in range(self._rules.merging.passes):
            brought = self._rules.bring(self._inputs[unit], means)
            means.append({name: tensor * share for name, tensor in brought.items()})
        return replace(self._rules.finish(self._inputs[unit], means), moments={})  # its own are there already

    def _errors(
        self, entry: UnitClass, states: Mapping[UnitId, UnitResult], votes: Mapping[PeerId, Vote]
    ) -> list[tuple[float, float]]:
        """Per unit: the relative merging error, and the norm that it is relative to."""
        brought = _read_probes(entry, votes)
        found: list[tuple[float, float]] = []
        offset = 0
        for unit in entry.units:
            scaling = self._inputs[unit].view.scaling
            merged = self._rules.probes(states[unit].merged, scaling, self._number)
            parts = [probes[offset : offset + merged.numel()] for probes in brought]
            offset += merged.numel()
            if merged.numel() and len(parts) == len(entry.holders) and all(len(p) == merged.numel() for p in parts):
                shares = self._plan.shares[unit]
                # FedNova's shares weigh changes and do not sum to 1: what is missing is the anchor's.
                if abs(missing := 1.0 - sum(shares)) > _ROUNDING:
                    parts.append(self._rules.probes(self._inputs[unit].view.anchor, scaling, self._number))
                    shares = (*shares, missing)
                mean = sum((share * part for share, part in zip(shares, parts, strict=True)), torch.zeros_like(merged))
                found.append((merging_error(parts, shares, merged), float(mean.norm())))
        return found

    def _probed(self, unit: UnitId) -> torch.Tensor:
        view = self._inputs[unit].view
        return self._rules.probes(view.live, view.scaling, self._number)

    def _has(self, unit: UnitId) -> bool:
        return unit in self._inputs and bool(self._inputs[unit].view.live)


def _read_probes(entry: UnitClass, votes: Mapping[PeerId, Vote]) -> Sequence[torch.Tensor]:
    """What each holder says, in the holders' order; none at all where one says what cannot be read."""
    found = []
    for holder in entry.holders:
        data = votes[holder].probes if holder in votes else b""
        if len(data) % 4:
            return []
        values = torch.frombuffer(bytearray(data), dtype=torch.float32) if data else torch.zeros(0)
        if not merge.is_finite(values):
            return []
        found.append(values)
    return found


def _overall(errors: Sequence[tuple[float, float]]) -> float | None:
    """One relative error for all units, each weighed by its norm."""
    if not errors:
        return None
    total = sum(norm * norm for _, norm in errors)
    return float((sum((error * norm) ** 2 for error, norm in errors) / total) ** 0.5) if total else 0.0


def _pass_id(class_id: bytes, index: int) -> bytes:
    return hashlib.sha256(class_id + b"pass" + index.to_bytes(2, "big")).digest()
