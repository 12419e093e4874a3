"""Training runs to compare: one process on everything, or peers of one kind of text each, on the very same rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from parts.learning_model import Lab
from parts.learning_peers import LearningPeer, PeerRules, apply, final_units, run_round
from parts.learning_texts import Rows
from torch import Tensor

from averaging.recipe import Recipe
from blocks.adapters import UnitTensors
from blocks.spans import UnitId
from blocks.training.local_rules import LocalRule
from blocks.training.optimizer import OptimizerConfig
from swarm.units.book import RoundResult

PEERS = 4
Units = Mapping[UnitId, UnitTensors]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One row of the table: a run's rules, and how many local steps lie between two rounds.

    `ranks` and `paces` are by peer: its own rank (0: the run's), and its local steps of a round where peers differ;
    their mean must be `local_steps`. `rate_of` names the row whose learning rate it takes, if not one of its own.
    """

    name: str
    recipe: Recipe = field(default_factory=Recipe)
    local_steps: int = 10
    ranks: tuple[int, ...] = (0,) * PEERS
    paces: tuple[int, ...] = ()
    rate_of: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """The same for every run: steps of every peer in all, and rows that each brings to a step."""

    steps: int
    rows: int

    @property
    def samples(self) -> int:
        """Rows in all."""
        return self.steps * self.rows * PEERS

    def optimizer(self, rate: float, recipe: Recipe) -> OptimizerConfig:
        """AdamW for this course, with a warm-up over a twentieth and a cosine to zero."""
        return OptimizerConfig(
            learning_rate=rate,
            warmup_samples=self.samples // 20,
            total_samples=self.samples,
            schedule="cosine",
            local=LocalRule(
                proximal=recipe.proximal if recipe.local == "fedprox" else 0.0, control=recipe.local == "scaffold"
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """What the peers train on, one kind each, and mixtures of all kinds to judge by: for rates, and for the table."""

    kinds: Sequence[Tensor]
    tuning_BT: Tensor
    held_out_BT: Tensor

    def rows(self, seed: int) -> list[Rows]:
        """Each peer's own, in the order of this seed."""
        return [Rows(rows_NT, 1000 * seed + place) for place, rows_NT in enumerate(self.kinds)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one run came to. Losses are infinite where it diverged; bytes are what a peer sent, the mean of all."""

    tuning_loss: float
    held_out_loss: float
    merging_error: float = 0.0
    bytes_sent: float = 0.0


class Runs:
    """Runs on one model, one text and one course."""

    def __init__(self, lab: Lab, data: Data, course: Course) -> None:
        self.lab, self.data, self.course = lab, data, course
        self.untrained = self._outcome(final_units([self._peer(0, Rule(name="untrained"), 1.0, 0)]))

    @property
    def bytes_of_every_step(self) -> float:
        """What a peer sends if gradients are averaged in every step: fp32, 2 (n - 1) / n of the adapter each time."""
        units = final_units([self._peer(0, Rule(name="size"), 1.0, 0)])
        num_values = sum(tensor.numel() for tensors in units.values() for tensor in tensors.values())
        return self.course.steps * 2 * (PEERS - 1) / PEERS * 4 * num_values

    def alone(self, rate: float, seed: int) -> Outcome:
        """The reference: one process, whose every step has the rows of the same step of all peers."""
        rows, each = self.data.rows(seed), self.course.rows
        peer = self._peer(0, Rule(name="reference"), rate, seed)
        for step in range(self.course.steps):
            mixed_BT = torch.cat([kind.take(step * each, each) for kind in rows])
            peer.step(mixed_BT, seen=step * each * PEERS)
        return self._outcome(peer.live())

    def together(self, rule: Rule, rate: float, seed: int) -> Outcome:
        """Peers by this rule."""
        rows, each = self.data.rows(seed), self.course.rows
        peers = [self._peer(place, rule, rate, seed) for place in range(PEERS)]
        paces = rule.paces or (rule.local_steps,) * PEERS
        if sum(paces) != PEERS * rule.local_steps or self.course.steps % rule.local_steps:
            raise ValueError(f"'{rule.name}' takes {paces} local steps, which do not fill {self.course.steps}")
        errors, sent = [], 0
        late: Sequence[RoundResult] = ()
        for number in range(self.course.steps // rule.local_steps):
            before = number * rule.local_steps * each * PEERS
            for peer, kind, pace in zip(peers, rows, paces, strict=True):
                for step in range(pace):
                    # By the round's clock, which all peers go through at their own pace.
                    seen = before + step * rule.local_steps * each * PEERS // pace
                    peer.step(kind.take((number * pace + step) * each, each), seen=seen)
            if not all(peer.is_finite() for peer in peers):
                return Outcome(tuning_loss=math.inf, held_out_loss=math.inf)
            if late:  # as late as a result can come: when the next round begins
                apply(peers, late)
            report = run_round(peers, number + 1)
            errors.append(report.error)
            sent += sum(report.bytes_sent)
            late = report.results if rule.recipe.overlap else ()
            if not late:
                apply(peers, report.results)
        if late:
            apply(peers, late)
        return self._outcome(final_units(peers), error=sum(errors) / len(errors), bytes_sent=sent / PEERS)

    def _peer(self, place: int, rule: Rule, rate: float, seed: int) -> LearningPeer:
        optimizer = self.course.optimizer(rate, rule.recipe)
        rules = PeerRules(recipe=rule.recipe, optimizer=optimizer, seed=seed, own_rank=rule.ranks[place])
        return LearningPeer(self.lab, place, rules)

    def _outcome(self, units: Units, *, error: float = 0.0, bytes_sent: float = 0.0) -> Outcome:
        return Outcome(
            tuning_loss=self.lab.loss(units, self.data.tuning_BT),
            held_out_loss=self.lab.loss(units, self.data.held_out_BT),
            merging_error=error,
            bytes_sent=bytes_sent,
        )
