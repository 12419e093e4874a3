"""The rows of the table: which rules are compared, at which learning rates, and what is said of each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from parts.learning_runs import Outcome, Rule, Runs
from rich.table import Table

from averaging.recipe import Recipe

MEAN, NESTEROV = "mean", "nesterov"
NESTEROV_50, MOMENTS_50 = "nesterov, 50 steps", "nesterov moments, 50 steps"
MOMENTS_INT8_50 = "nesterov moments int8, 50 steps"
REFERENCE = "one process"
SHORT, LONG = 4, 50
Say = Callable[[str], None]

_PACES = (2, 3, 5, 6)
_NESTEROV = Recipe(outer="nesterov", outer_learning_rate=0.7, outer_momentum=0.5)  # 0.9 is for hundreds of rounds
# After many local steps peers with unlike data have gone ways of their own, and a mean of n takes an n-th of each.
_NESTEROV_LONG = replace(_NESTEROV, outer_learning_rate=1.4)
# Rules that change what a peer learns, or how fast, choose a learning rate of their own.
_OWN_RATE = {
    MEAN: Recipe(),
    "ffa": Recipe(merging="ffa"),
    "rolora": Recipe(merging="rolora"),
    "power": Recipe(merging="power"),
    "scaffold": Recipe(local="scaffold"),
    "moments": Recipe(moments="mean"),
    NESTEROV: _NESTEROV,
    "outer adam": Recipe(outer="adam", outer_learning_rate=1e-3),
    "mean, 50 steps": Recipe(),
    NESTEROV_50: _NESTEROV_LONG,
    MOMENTS_50: replace(_NESTEROV_LONG, moments="mean"),
}
# Those that carry or guard the same update take its rate.
_RATE_OF = {
    "overlap": (MEAN, Recipe(overlap=True)),
    "fedprox": (MEAN, Recipe(local="fedprox")),
    "fednova": (MEAN, Recipe(local="fednova")),
    "fp16": (MEAN, Recipe(codec="fp16")),
    "int8": (MEAN, Recipe(codec="int8")),
    "int4": (MEAN, Recipe(codec="int4")),
    "topk": (MEAN, Recipe(codec="topk")),
    "trimmed": (MEAN, Recipe(robust="trimmed", weighting="equal")),
    "clip": (MEAN, Recipe(robust="clip", weighting="equal")),
    "uneven, fedavg": (MEAN, Recipe(weighting="equal")),
    "uneven, fednova": (MEAN, Recipe(weighting="equal", local="fednova")),
    "power, mixed ranks": ("power", Recipe(merging="power")),
    "nesterov scaffold, 50 steps": (NESTEROV_50, replace(_NESTEROV_LONG, local="scaffold")),
    "nesterov int8, 50 steps": (NESTEROV_50, replace(_NESTEROV_LONG, codec="int8")),
    MOMENTS_INT8_50: (MOMENTS_50, replace(_NESTEROV_LONG, moments="mean", codec="int8")),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What all seeds of one rule came to; losses and gaps are means over them."""

    rule: Rule
    rate: float
    held_out_loss: float
    gap_percents: tuple[float, ...]
    gain_share: float
    merging_error: float
    bytes_per_peer: float
    traffic_ratio: float

    @property
    def gap_percent(self) -> float:
        """By how much the held-out loss is above the reference's."""
        return statistics.mean(self.gap_percents)

    def to_plain(self) -> dict[str, object]:
        """For JSON."""
        recipe = self.rule.recipe
        names = ("merging", "local", "weighting", "moments", "outer", "codec", "robust")
        return {
            "name": self.rule.name,
            **{name: getattr(recipe, name) for name in names},
            "overlap": recipe.overlap,
            "local_steps": self.rule.paces or self.rule.local_steps,
            "ranks": self.rule.ranks,
            "learning_rate": self.rate,
            "held_out_loss": _number(self.held_out_loss, 4),
            "gap_percent": _number(self.gap_percent, 3),
            "gap_percent_by_seed": [_number(each, 3) for each in self.gap_percents],
            "share_of_gain": _number(self.gain_share, 4),
            "merging_error": _number(self.merging_error, 4),
            "bytes_per_peer": round(self.bytes_per_peer),
            "traffic_ratio": _number(self.traffic_ratio, 5),
        }


def all_rules(rank: int, *, short: int = SHORT, long: int = LONG) -> tuple[dict[str, Rule], dict[str, Rule]]:
    """By name: those whose rounds are `short` local steps apart, and those with `long` ones, whose names say 50."""
    found = {name: Rule(name=name, recipe=recipe, local_steps=short) for name, recipe in _OWN_RATE.items()}
    for name, (source, recipe) in _RATE_OF.items():
        rule = Rule(name=name, recipe=recipe, local_steps=short, rate_of=source)
        if "uneven" in name:
            rule = replace(rule, paces=tuple(pace * short // SHORT for pace in _PACES))
        if "mixed" in name:
            rule = replace(rule, ranks=(0, 0, rank // 2, rank // 2))
        found[name] = rule
    far = {name: replace(rule, local_steps=long) for name, rule in found.items() if "50" in name}
    return {name: rule for name, rule in found.items() if name not in far}, far


def measure(runs: Runs, rules: Sequence[Rule], rates: Sequence[float], seeds: Sequence[int], say: Say) -> list[Row]:
    """The reference's row, then every rule's.

    The reference and the rules that choose a rate do so among the same `rates`, by the loss of the tuning text with the
    first seed; a rule with `rate_of` takes that one's.
    """
    reference_rate, reference = _trained(runs.alone, rates, seeds)
    chosen: dict[str, float] = {}
    rows = [_row(runs, Rule(name=REFERENCE, local_steps=1), reference_rate, reference, reference)]
    say(_shown(rows[0]))
    for rule in rules:
        own = (chosen[rule.rate_of],) if rule.rate_of else rates

        def train(rate: float, seed: int, rule: Rule = rule) -> Outcome:
            return runs.together(rule, rate, seed)

        chosen[rule.name], outcomes = _trained(train, own, seeds)
        rows.append(_row(runs, rule, chosen[rule.name], outcomes, reference))
        say(_shown(rows[-1]))
    return rows


def summary(rows: Sequence[Row], long_rows: Sequence[Row]) -> dict[str, object]:
    """The best of all rules, and what the outer step and averaged moments make of few rounds."""
    best = best_rules(rows, 1)[0]
    (far,) = (row for row in long_rows if row.rule.name == MOMENTS_INT8_50)
    return {
        "best_rule": best.rule.name,
        "best_gap_percent": _number(best.gap_percent, 3),
        "nesterov_50_rule": far.rule.name,
        "nesterov_50_gap_percent": _number(far.gap_percent, 3),
        "nesterov_50_traffic_ratio": _number(far.traffic_ratio, 5),
    }


def best_rules(rows: Sequence[Row], count: int) -> list[Row]:
    """Those nearest to the reference."""
    return sorted(rows[1:], key=lambda row: row.gap_percent)[:count]


def table(title: str, rows: Sequence[Row]) -> Table:
    """For people."""
    found = Table(title=title, title_justify="left")
    for column in ("rule", "steps", "rate", "loss", "gap %", "of the gain", "merging error", "kB sent", "traffic"):
        found.add_column(column, justify="left" if column == "rule" else "right", no_wrap=True)
    for row in rows:
        steps = row.rule.paces or (row.rule.local_steps,)
        found.add_row(
            row.rule.name,
            ":".join(map(str, steps)),
            f"{row.rate:g}",
            f"{row.held_out_loss:.4f}",
            f"{row.gap_percent:+.2f}",
            f"{row.gain_share:.1%}",
            f"{row.merging_error:.4f}",
            f"{row.bytes_per_peer / 1000:.0f}",
            f"{row.traffic_ratio:.4f}",
        )
    return found


def _trained(
    train: Callable[[float, int], Outcome], rates: Sequence[float], seeds: Sequence[int]
) -> tuple[float, list[Outcome]]:
    """The rate that serves the tuning text best with the first seed, and what every seed comes to with it."""
    tried = {rate: train(rate, seeds[0]) for rate in rates}
    rate = min(tried, key=lambda each: tried[each].tuning_loss)
    return rate, [tried[rate], *(train(rate, seed) for seed in seeds[1:])]


def _row(runs: Runs, rule: Rule, rate: float, outcomes: Sequence[Outcome], reference: Sequence[Outcome]) -> Row:
    losses = [outcome.held_out_loss for outcome in outcomes]
    targets = [outcome.held_out_loss for outcome in reference]
    loss, target = statistics.mean(losses), statistics.mean(targets)
    before = runs.untrained.held_out_loss
    num_bytes = statistics.mean(outcome.bytes_sent for outcome in outcomes)
    if rule.name == REFERENCE:
        num_bytes = runs.bytes_of_every_step
    return Row(
        rule=rule,
        rate=rate,
        held_out_loss=loss,
        gap_percents=tuple(100 * (one / other - 1) for one, other in zip(losses, targets, strict=True)),
        gain_share=(before - loss) / (before - target),
        merging_error=statistics.mean(outcome.merging_error for outcome in outcomes),
        bytes_per_peer=num_bytes,
        traffic_ratio=num_bytes / runs.bytes_of_every_step,
    )


def _shown(row: Row) -> str:
    return f"{row.rule.name} at {row.rate:g}: loss {row.held_out_loss:.4f}, gap {row.gap_percent:+.2f}%"


def _number(value: float, digits: int) -> float | None:
    """JSON has no infinity, which a run that diverged comes to."""
    return round(value, digits) if math.isfinite(value) else None
