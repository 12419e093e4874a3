"""Held-out rows of several trainers, measured with one adapter and added up; and rows with labels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from swarm.data.stream import SampleSet
from swarm.peer import Peer
from swarm.reports.metrics import read_metrics
from swarm.training.best_adapter import BEST, read_best
from swarm.training.evaluation_sums import Evaluation, Scores
from swarm.training.jobs import TrainingResult
from tests.integration.swarm.conftest import MakeSwarm
from tests.integration.swarm.small_swarm import BACK, FRONT, WHOLE, random_samples

BATCH, STEPS = 4, 2
SETTINGS = {
    "training": {"batch_size": BATCH, "learning_rate": 1e-2, "sequence_length": 24},
    "rounds": {"round_samples": 2 * BATCH * STEPS},
}
SIGNS = {"w10": "w50", "w11": "w51"}
"""The word that says which label a row has."""


def labelled_rows(count: int, *, first: int = 0) -> Iterator[dict[str, str]]:
    for number in range(first, first + count):
        words = " ".join(f"w{3 + (7 * number + place * (1 + number % 5)) % 7}" for place in range(4 + number % 3))
        sign = list(SIGNS)[number % len(SIGNS)]
        yield {"text": f"{words} {sign}", "label": SIGNS[sign]}


def write_rows(path: Path, *rows: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(peer: Peer, data: SampleSet, held_out: SampleSet) -> TrainingResult:
    return peer.train(data, steps=STEPS, held_out=held_out, last_round=1)


def scores(found: Evaluation) -> Scores:
    assert found.scores is not None
    return found.scores


def test_the_loss_over_all_trainers_is_that_of_all_rows_together(make_swarm: MakeSwarm, tmp_path: Path) -> None:
    swarm = make_swarm(SETTINGS)
    swarm.hosts(a=FRONT, b=BACK)
    rows = list(labelled_rows(24)) + [{"text": " ".join(f"w{word}" for word in range(20, 29))}] * 2
    parts = [write_rows(tmp_path / f"{place}.jsonl", *rows[place::3], *rows[place + 1 :: 3]) for place in (0, 1)]
    trainers = [swarm.enter(name) for name in ("ann", "bob")]
    with ThreadPoolExecutor(2) as pool:
        held_out = [peer.load([path]) for peer, path in zip(trainers, parts, strict=True)]
        results = list(pool.map(train, trainers, [random_samples(8), random_samples(8, seed=6)], held_out))

    judge = swarm.enter("judge")
    pooled = judge.train(random_samples(8), steps=1, held_out=judge.load(parts)).evaluations[0]
    assert pooled.round == 1
    for name, result in zip(("ann", "bob"), results, strict=True):
        (summed,) = [found for found in result.swarm_evaluations if found.round == 1]
        assert (summed.peers, summed.tokens) == (2, pooled.tokens)
        assert summed.loss == pytest.approx(pooled.loss, abs=1e-5)
        own = result.evaluations[-1]
        assert own.round == 1
        assert own.tokens < pooled.tokens
        assert own.loss != pytest.approx(pooled.loss, abs=1e-3), "each has other rows"
        assert (scores(summed).rows, scores(own).rows) == (scores(pooled).rows, 16)
        assert scores(summed).accuracy == pytest.approx(scores(pooled).accuracy)
        assert scores(summed).macro_f1 == pytest.approx(scores(pooled).macro_f1)
        auc, exact = scores(summed).auc, scores(pooled).auc
        assert auc is not None
        assert exact is not None
        assert abs(auc - exact) <= scores(summed).auc_error + scores(pooled).auc_error

        states = swarm.run / "states" / name
        told = [entry for entry in read_metrics(states) if entry.kind == "swarm_evaluation"]
        assert (told[-1].number("round"), told[-1].number("peers")) == (1, 2)
        assert told[-1].number("loss") == summed.loss
        best = read_best(states / BEST)
        assert best is not None
        assert (best.round, best.loss, len(best.parts)) == (1, summed.loss, 2)
    assert results[0].swarm_evaluations[-1] == results[1].swarm_evaluations[-1], "equal to the bit"


def test_rows_are_classified_better_as_the_adapter_learns(make_swarm: MakeSwarm, tmp_path: Path) -> None:
    steps = 24
    swarm = make_swarm({**SETTINGS, "rounds": {"round_samples": BATCH * steps}})
    alone = swarm.host("alone", WHOLE)
    data = alone.load([write_rows(tmp_path / "train.jsonl", *labelled_rows(64))])
    held_out = alone.load([write_rows(tmp_path / "held_out.jsonl", *labelled_rows(20, first=64))], labels=["w52"])
    result = alone.train(data, steps=steps, held_out=held_out, last_round=1)
    before, after = result.evaluations[0], result.evaluations[-1]
    assert scores(before).rows == scores(after).rows == 20
    assert scores(before).accuracy < 0.8
    assert scores(after).accuracy > 0.9
    assert scores(after).macro_f1 > 0.9
    assert (scores(after).auc or 0.0) > 0.9
    assert after.loss < before.loss / 2
    assert result.swarm_evaluations[-1] == after
