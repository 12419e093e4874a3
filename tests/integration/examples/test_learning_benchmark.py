"""The benchmark of learning measures what it says, here with a tiny model and a few steps."""

from __future__ import annotations

import json
import math

import pytest
from parts import learning_setup
from parts.learning_model import SmallModel
from parts.learning_runs import Course
from parts.learning_texts import Rows, as_bytes, cut, kinds, split
from parts.report import Bench


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The whole table, of runs of eight steps."""
    size = learning_setup.Size(
        model=SmallModel(hidden=32, layers=1, steps=4),
        course=Course(steps=8, rows=1),
        long_course=Course(steps=16, rows=1),
        tokens=16,
        tuning_rows=2,
        held_out_rows=4,
        rates=(1e-2,),
        long_rates=(1e-2,),
        seeds=(0,),
        short=4,
        long=8,
    )
    return learning_setup.measure_small(Bench(directory=tmp_path_factory.mktemp("learning"), quick=True), size)[1]


def test_every_rule_has_a_row_and_its_bytes(found: dict[str, object]) -> None:
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(found, allow_nan=False))
    assert found.keys() >= {"rows", "best_rule", "best_gap_percent", "nesterov_50_gap_percent", "reference_loss"}
    rows = {row["name"]: row for row in found["rows"]}
    assert len(rows) == len(found["rows"]) >= 18
    far = {row["name"]: row for row in found["long_rows"]}
    assert far.keys() == {
        "one process",
        "mean, 50 steps",
        *(f"nesterov{name}, 50 steps" for name in ("", " scaffold", " int8", " moments", " moments int8")),
    }
    reference, mean = rows["one process"], rows["mean"]
    assert reference["gap_percent"] == 0
    assert all(row["held_out_loss"] < math.log(256) + 1 for row in rows.values())
    # Two rounds of the whole vector instead of eight steps, and one instead of eight.
    assert mean["traffic_ratio"] == pytest.approx(0.25, rel=0.01)
    assert far["nesterov, 50 steps"]["traffic_ratio"] == pytest.approx(0.125, rel=0.01)
    assert far["nesterov moments, 50 steps"]["traffic_ratio"] == pytest.approx(0.375, rel=0.01)
    assert found["nesterov_50_rule"] == "nesterov moments int8, 50 steps"
    assert found["nesterov_50_traffic_ratio"] == far[found["nesterov_50_rule"]]["traffic_ratio"] < 0.126
    by_codec = [rows[name]["bytes_per_peer"] / mean["bytes_per_peer"] for name in ("fp16", "int8", "int4", "topk")]
    assert by_codec == sorted(by_codec, reverse=True)
    assert by_codec[1] == pytest.approx(0.25, abs=0.02)
    # Both are exact, as only one factor of each product moves.
    assert rows["ffa"]["merging_error"] < 1e-5 < rows["mean"]["merging_error"]
    assert rows["rolora"]["merging_error"] < 1e-5


def test_rules_that_only_carry_a_mean_of_equals_learn_as_it_does(found: dict[str, object]) -> None:
    rows = {row["name"]: row for row in found["rows"]}
    for name in ("fednova", "fp16", "int8"):
        assert rows[name]["held_out_loss"] == pytest.approx(rows["mean"]["held_out_loss"], rel=1e-3)


def test_all_text_is_disjoint_and_repeatable() -> None:
    for documents in kinds().values():
        parts = split(documents)
        assert all(len(text) > 10_000 for text in parts.values())
        rows = cut(parts["train"], as_bytes, 64)
        assert bool((Rows(rows, 3).take(5, 4) == Rows(rows, 3).take(0, 9)[5:]).all())
    assert split(["a", "b", "c"]) == split(["c", "b", "a", "a"])
