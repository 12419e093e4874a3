"""The best adapter by held-out loss: kept when it is, whole or not at all, and exported without a swarm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blocks.errors import BadAdapter
from peers.errors import NoRoute
from swarm.errors import BadCheckpoint
from swarm.training.best_adapter import BEST, Best, BestAdapter, Parts, export_best, read_best
from swarm.training.evaluation_sums import Evaluation


class FakeExport:
    """Writes an adapter of the run's newest round."""

    def __init__(self) -> None:
        self.round, self.fails = 1, False

    async def __call__(self, directory: Path) -> int:
        self._write(directory)
        if self.fails:
            raise NoRoute("nobody holds block 3")
        return self.round

    def _write(self, directory: Path) -> None:
        directory.mkdir()
        (directory / "adapter_config.json").write_text(f"round {self.round}")


ANN, BOB, CEM = "QmAnn", "QmBob", "QmCem"


def seen(number: int, loss: float) -> Evaluation:
    return Evaluation(round=number, loss=loss, tokens=10)


async def take(keeping: BestAdapter, found: Evaluation, parts: Parts | None = None) -> None:
    """What a trainer does with an evaluation of its own rows, or of those in `parts`."""
    await keeping.fetch(found.round)
    keeping.settle(found, parts or {ANN: (found.loss * found.tokens, found.tokens)})


def kept_in(directory: Path) -> Best:
    kept = read_best(directory)
    assert kept is not None
    return kept


async def test_the_lowest_loss_is_kept_also_by_the_next_process(tmp_path: Path) -> None:
    export, directory = FakeExport(), tmp_path / BEST
    keeping = BestAdapter(directory, export)
    await take(keeping, seen(0, 1.0))
    assert read_best(directory) is None, "nothing is learnt before the first round"
    for number, loss, best in ((1, 2.0, 1), (2, 1.5, 2), (3, 1.6, 2)):
        export.round = number
        await take(keeping, seen(number, loss))
        assert kept_in(directory).round == best
        assert (directory / "adapter_config.json").read_text() == f"round {best}"
    export.round = 4
    await take(BestAdapter(directory, export), seen(4, 1.55))
    assert (kept_in(directory).round, kept_in(directory).loss) == (2, 1.5)
    assert os.listdir(tmp_path) == [BEST]


async def test_what_cannot_be_fetched_or_was_replaced_leaves_the_old_one(tmp_path: Path) -> None:
    export, directory = FakeExport(), tmp_path / BEST
    keeping = BestAdapter(directory, export)
    await take(keeping, seen(1, 2.0))
    export.round = 3
    await take(keeping, seen(2, 1.0))  # round 3 came before it was fetched
    export.fails, export.round = True, 2
    await take(keeping, seen(2, 1.0))
    assert kept_in(directory).round == 1
    assert os.listdir(tmp_path) == [BEST]
    export.fails = False
    await take(keeping, seen(2, 1.9))
    assert kept_in(directory).round == 2, "what was not kept is not the best"


async def test_an_adapter_waits_for_its_loss_while_the_run_goes_on(tmp_path: Path) -> None:
    export, directory = FakeExport(), tmp_path / BEST
    keeping = BestAdapter(directory, export)
    for export.round in (1, 2, 3, 4):
        await keeping.fetch(export.round)
    keeping.settle(seen(1, 0.5), {ANN: (5.0, 10)})
    assert read_best(directory) is None, "three are kept at most, the newest"
    keeping.settle(seen(3, 2.0), {ANN: (20.0, 10)})
    keeping.settle(seen(2, 1.0), {ANN: (10.0, 10)})
    assert kept_in(directory).round == 2
    assert (directory / "adapter_config.json").read_text() == "round 2"
    keeping.close()
    assert os.listdir(tmp_path) == [BEST]
    await keeping.fetch(4)
    BestAdapter(directory, export)
    assert os.listdir(tmp_path) == [BEST], "what a process that was killed had fetched is removed"


async def test_adapters_are_compared_by_the_rows_of_those_who_measured_both(tmp_path: Path) -> None:
    export, directory = FakeExport(), tmp_path / BEST
    keeping = BestAdapter(directory, export)
    await take(keeping, seen(1, 2.0), {ANN: (20.0, 10)})
    export.round = 2
    await take(keeping, seen(2, 3.0), {ANN: (19.0, 10), BOB: (41.0, 10)})
    assert kept_in(directory).round == 2, "harder rows of a newcomer are no reason to keep the old one"
    assert kept_in(directory).parts == {ANN: (19.0, 10), BOB: (41.0, 10)}
    keeping, export.round = BestAdapter(directory, export), 3
    await take(keeping, seen(3, 1.8), {ANN: (18.0, 10), BOB: (43.0, 10)})
    assert kept_in(directory).round == 2, "what Ann gains Bob loses twice"
    await take(keeping, seen(3, 1.8), {ANN: (18.0, 10), CEM: (99.0, 10)})
    assert kept_in(directory).round == 3, "Bob is gone, and Ann's rows say so"
    export.round = 4
    await take(keeping, seen(4, 9.0), {ANN: (90.0, 11)})
    assert kept_in(directory).round == 4, "Ann has other rows now, on which the old one was never measured"


async def test_a_kept_loss_without_the_rows_behind_it_counts(tmp_path: Path) -> None:
    directory = tmp_path / BEST
    await take(BestAdapter(directory, FakeExport()), seen(1, 2.0))
    (directory / "validation.json").write_text('{"round": 1, "loss": 2.0, "peers": {"QmAnn": ["x", 2]}}')
    export = FakeExport()
    export.round = 2
    await take(BestAdapter(directory, export), seen(2, 2.1))
    assert kept_in(directory).round == 1
    await take(BestAdapter(directory, export), seen(2, 1.9))
    assert kept_in(directory).round == 2


async def test_the_best_of_several_trainers_is_exported(tmp_path: Path) -> None:
    for name, loss in (("ann", 2.0), ("bob", 1.0)):
        (tmp_path / name).mkdir()
        await take(BestAdapter(tmp_path / name / BEST, FakeExport()), seen(1, loss))
    states = [tmp_path / name for name in ("none", "ann", "bob")]
    best = export_best(states, tmp_path / "out")
    assert best.loss == 1.0
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    export_best(states, tmp_path / "out")
    with pytest.raises(BadCheckpoint, match="no best adapter is kept on this machine; train with --eval-data"):
        export_best(states[:1], tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(BadAdapter, match="full is not empty and holds no adapter"):
        export_best(states, tmp_path / "full")


@pytest.mark.parametrize("note", ["", "[]", '{"round": 1}', '{"round": -1, "loss": 1.0}', '{"round": 1, "loss": NaN}'])
def test_a_note_that_makes_no_sense_is_no_adapter(tmp_path: Path, note: str) -> None:
    (tmp_path / "adapter_config.json").touch()
    (tmp_path / "validation.json").write_text(note)
    assert read_best(tmp_path) is None
