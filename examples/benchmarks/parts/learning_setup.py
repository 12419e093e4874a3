"""What the comparison of rules runs on: the small model, and SmolLM2 for the best of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from parts.learning_model import Lab, SmallModel, make_small
from parts.learning_rules import (
    LONG,
    MEAN,
    MOMENTS_INT8_50,
    NESTEROV,
    NESTEROV_50,
    SHORT,
    Row,
    all_rules,
    best_rules,
    measure,
    summary,
    table,
)
from parts.learning_runs import Course, Data, Runs
from parts.learning_texts import Encode, as_bytes, cut, kinds, mixture, sources, split
from parts.report import Bench, Values
from parts.texts import source
from rich.console import Console
from torch import Tensor

from blocks.load import load_tokenizer

RANK = 8
RATES, FEW_RATES, LONG_RATES = (1e-3, 3e-3, 1e-2, 2e-2), (3e-3, 1e-2, 2e-2), (3e-3,)
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SMOLLM2_RATES = (2e-3, 4e-3)  # peers with unlike data go further at a higher one than one process does
TABLE_COLUMNS = 120
_TUNED_IN_QUICK = (MEAN, NESTEROV)
SMOLLM2_COURSE = Course(steps=48, rows=1)
SMOLLM2_TOKENS, SMOLLM2_TUNING_ROWS, SMOLLM2_ROWS = 128, 4, 6
SMOLLM2_CHARACTERS = 60_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much is done: the model, the course of every run and that of rules with many local steps, how many seeds,
    whether each rule tries all rates, and which rules with many local steps there are (all: none named).
    """

    model: SmallModel = field(default_factory=SmallModel)
    course: Course = field(default_factory=lambda: Course(steps=200, rows=2))
    long_course: Course = field(default_factory=lambda: Course(steps=1000, rows=2))
    tokens: int = 64
    tuning_rows: int = 48
    held_out_rows: int = 160
    rates: Sequence[float] = RATES
    long_rates: Sequence[float] = LONG_RATES
    seeds: Sequence[int] = (0, 1)
    tunes_all: bool = True
    long_names: Sequence[str] = ()
    short: int = SHORT
    long: int = LONG

    @classmethod
    def quick(cls) -> Size:
        """One seed, half of the steps; only `mean` and Nesterov's rules choose rates, and the others take `mean`'s.

        With many local steps half as many would tell nothing, so it is fewer rules.
        """
        return cls(
            model=SmallModel(steps=200),
            course=Course(steps=100, rows=2),
            long_names=(NESTEROV_50, MOMENTS_INT8_50),
            rates=FEW_RATES,
            seeds=(0,),
            tunes_all=False,
            tuning_rows=24,
            held_out_rows=64,
        )


def measure_small(bench: Bench, size: Size) -> tuple[list[Row], Values]:
    """The whole table."""
    before_NT = cut(split(sources())["train"], as_bytes, size.tokens)
    found, loss = make_small(size.model, before_NT, bench.directory / "small")
    bench.say(f"the small model has learnt Python sources: loss {loss:.3f}")
    data = _data(as_bytes, size.tokens, (size.tuning_rows, size.held_out_rows))
    lab = Lab(found, rank=RANK, targets=ALL_LINEAR)
    short_rules, long_rules = (list(rules.values()) for rules in all_rules(RANK, short=size.short, long=size.long))
    if not size.tunes_all:
        short_rules = [
            rule if rule.rate_of or rule.name in _TUNED_IN_QUICK else replace(rule, rate_of=MEAN)
            for rule in short_rules
        ]
    if size.long_names:  # each with a rate of its own, as those that they would take it from may not be there
        long_rules = [replace(rule, rate_of="") for rule in long_rules if rule.name in size.long_names]
    runs = Runs(lab, data, size.course)
    rows = measure(runs, short_rules, size.rates, size.seeds, bench.say)
    # With few rounds a course must be long before there is anything to compare.
    long_rows = measure(Runs(lab, data, size.long_course), long_rules, size.long_rates, size.seeds, bench.say)
    for title, shown in (("against one process on all of it", rows), ("in a longer course", long_rows)):
        Console(stderr=True, width=TABLE_COLUMNS).print(table(f"four peers with a kind of text each, {title}", shown))
    return rows, {
        "untrained_loss": round(runs.untrained.held_out_loss, 4),
        "reference_loss": round(rows[0].held_out_loss, 4),
        "samples": size.course.samples,
        "long_samples": size.long_course.samples,
        "learning_rates": list(size.rates),
        "seeds": len(size.seeds),
        "rows": [row.to_plain() for row in rows],
        "long_rows": [row.to_plain() for row in long_rows],
        **summary(rows, long_rows),
    }


def measure_smollm2(bench: Bench, small: Sequence[Row]) -> Values:
    """The three rules that came nearest with the small model, on a real one."""
    model = source()
    tokenizer = load_tokenizer(model)

    def encode(text: str) -> Sequence[int]:
        ids: list[int] = tokenizer(text[:SMOLLM2_CHARACTERS])["input_ids"]
        return ids

    data = _data(encode, SMOLLM2_TOKENS, (SMOLLM2_TUNING_ROWS, SMOLLM2_ROWS))
    runs = Runs(Lab(model, rank=RANK, targets="auto"), data, SMOLLM2_COURSE)
    bench.say(f"SmolLM2 is loaded: loss {runs.untrained.held_out_loss:.3f}")
    known, _ = all_rules(RANK)
    rules = [replace(known[row.rule.name], rate_of="") for row in best_rules(small, 3)]
    rows = measure(runs, rules, SMOLLM2_RATES, (0,), bench.say)
    Console(stderr=True, width=TABLE_COLUMNS).print(table("the three best with SmolLM2-135M", rows))
    return {
        "smollm2_learning_rates": list(SMOLLM2_RATES),
        "smollm2_untrained_loss": round(runs.untrained.held_out_loss, 4),
        "smollm2_rows": [row.to_plain() for row in rows],
        "smollm2_best_gap_percent": round(best_rules(rows, 1)[0].gap_percent, 3),
    }


def _data(encode: Encode, length: int, num_rows: tuple[int, int]) -> Data:
    parts = {name: split(documents) for name, documents in kinds().items()}

    def rows(part: str) -> Mapping[str, Tensor]:
        return {name: cut(texts[part], encode, length) for name, texts in parts.items()}

    tuning, held_out = num_rows
    return Data(
        kinds=list(rows("train").values()),
        tuning_BT=mixture(rows("tuning"), tuning),
        held_out_BT=mixture(rows("held_out"), held_out),
    )
