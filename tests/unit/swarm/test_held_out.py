"""A loop's own evaluation as sums: exact, whole, of one round's adapter, or not told."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from swarm.own_loops.counting import HeldOutCounter
from swarm.own_loops.held_out import HeldOut
from swarm.training.evaluation_sums import Sums

VOCAB = 7


class Model(nn.Module):
    """Gives logits for ids, and a mean loss that is not to be believed."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, VOCAB)
        self.keeps = slice(None)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(loss=torch.tensor(99.0), logits=self.table(input_ids)[:, self.keeps])


@dataclass
class Run:
    """Implements held_out.Told."""

    round: int | None = 3
    told: list[tuple[int, Sums]] = field(default_factory=list)

    def shared_round(self) -> int | None:
        return self.round

    def tell(self, number: int, sums: Sums) -> None:
        self.told.append((number, sums))


def rows(count: int, seed: int) -> dict[str, torch.Tensor]:
    ids_BT = torch.randint(VOCAB, (count, 6), generator=torch.Generator().manual_seed(seed))
    labels_BT = ids_BT.clone()
    labels_BT[:, : 1 + seed] = -100
    return {"input_ids": ids_BT, "labels": labels_BT}


@pytest.fixture
def model() -> Model:
    return Model().eval()


@pytest.fixture
def run() -> Run:
    return Run()


def test_the_loss_is_summed_over_tokens_with_a_label(model: Model) -> None:
    counter = HeldOutCounter(model)
    batches = [rows(3, 1), rows(2, 3)]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
        model(batches[0]["input_ids"])  # nothing is measured of a text that is only read
    expected, tokens = 0.0, 0
    for batch in batches:
        chances = torch.log_softmax(model.table(batch["input_ids"]).detach().double(), -1)
        for row, labels in zip(chances, batch["labels"], strict=True):
            for place in range(1, 6):
                if labels[place] != -100:
                    expected -= float(row[place - 1, labels[place]])
                    tokens += 1
    found = counter.take(passes=2)
    assert found is not None
    assert tokens == found.tokens == 3 * 4 + 2 * 2
    assert found.loss == pytest.approx(expected, rel=1e-6)
    assert counter.take() is None
    counter.close()
    model(**batches[0])
    assert counter.take() is None


def test_what_is_not_whole_gives_no_sums(model: Model) -> None:
    counter = HeldOutCounter(model)
    model(**rows(2, 1))
    assert counter.take(passes=2) is None, "a pass of the two had no labels"
    model(**rows(2, 1))
    model.keeps = slice(-1, None)
    model(**rows(2, 1))
    assert counter.take() is None, "logits for the last place alone"
    model.keeps = slice(None)
    model.train()
    model(**rows(2, 1))
    model.eval()
    assert counter.take() is None, "in training there is dropout"
    unlabelled = rows(2, 1)
    unlabelled["labels"][:] = -100
    model(**unlabelled)
    assert counter.take() is None
    model(**rows(2, 1))
    assert counter.take() is not None, "the next one is not to blame"


def test_an_evaluation_of_one_rounds_adapter_is_told_with_all_its_sets(model: Model, run: Run) -> None:
    held_out = HeldOut(model, run)
    for seed in (1, 2):
        model(**rows(2, seed))
        held_out.begin()
        held_out.take_set(1)
    held_out.end()
    ((number, sums),) = run.told
    assert (number, sums.tokens) == (3, 2 * 4 + 2 * 3)
    held_out.end()
    assert len(run.told) == 1, "once"


@pytest.mark.parametrize(("before", "after"), [(None, None), (None, 3), (3, None), (3, 4)])
def test_what_was_trained_on_or_replaced_meanwhile_is_not_told(
    model: Model, run: Run, before: int | None, after: int | None
) -> None:
    held_out = HeldOut(model, run)
    run.round = before
    held_out.begin()
    model(**rows(2, 1))
    run.round = after
    held_out.take_set()
    held_out.end()
    assert not run.told


def test_one_set_that_cannot_be_summed_leaves_the_whole_untold(model: Model, run: Run) -> None:
    held_out = HeldOut(model, run)
    held_out.begin()
    model(**rows(2, 1))
    held_out.take_set()
    model(**rows(2, 1))
    held_out.take_set(passes=2)
    held_out.end()
    assert not run.told


def test_what_was_measured_before_belongs_to_no_evaluation(model: Model, run: Run) -> None:
    held_out = HeldOut(model, run)
    model(**rows(5, 1))
    held_out.forget()
    held_out.begin()
    model(**rows(2, 1))
    held_out.take_set()
    held_out.end()
    assert [sums.tokens for _, sums in run.told] == [2 * 4]


def test_counts_of_the_loop_itself_stand_in_place_of_those_of_passes(model: Model, run: Run) -> None:
    held_out = HeldOut(model, run)
    held_out.begin()
    model(**rows(5, 1))
    held_out.give(2.5, 100)
    held_out.take_set()
    held_out.end()
    ((_, sums),) = run.told
    assert (sums.loss, sums.tokens) == (250.0, 100)
    held_out.begin()
    model(**rows(5, 1))
    held_out.close()
    assert len(run.told) == 1, "what nobody said is over is not"
    held_out.begin()
    held_out.end()
    assert len(run.told) == 1
