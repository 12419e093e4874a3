"""The best adapter by held-out loss: kept when it is, whole or not at all, and exported without a swarm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blocks.errors import BadAdapter
from peers.errors import NoRoute
from swarm.best_adapter import BEST, BestAdapter, export_best, read_best
from swarm.errors import BadCheckpoint
from swarm.train import Evaluation


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


def seen(number: int, loss: float) -> Evaluation:
    return Evaluation(round=number, loss=loss, tokens=10)


async def test_the_lowest_loss_is_kept_also_by_the_next_process(tmp_path: Path) -> None:
    export, directory = FakeExport(), tmp_path / BEST
    keeping = BestAdapter(directory, export)
    await keeping.take(seen(0, 1.0))
    assert read_best(directory) is None, "nothing is learnt before the first round"
    for number, loss, best in ((1, 2.0, 1), (2, 1.5, 2), (3, 1.6, 2)):
        export.round = number
        await keeping.take(seen(number, loss))
        kept = read_best(directory)
        assert kept is not None
        assert kept.round == best
        assert (directory / "adapter_config.json").read_text() == f"round {best}"
    export.round = 4
    await BestAdapter(directory, export).take(seen(4, 1.55))
    kept = read_best(directory)
    assert kept is not None
    assert (kept.round, kept.loss) == (2, 1.5)
    assert os.listdir(tmp_path) == [BEST]


async def test_what_cannot_be_fetched_or_was_replaced_leaves_the_old_one(tmp_path: Path) -> None:
    export, directory = FakeExport(), tmp_path / BEST
    keeping = BestAdapter(directory, export)
    await keeping.take(seen(1, 2.0))
    export.round = 3
    await keeping.take(seen(2, 1.0))  # round 3 came before it was fetched
    export.fails, export.round = True, 2
    await keeping.take(seen(2, 1.0))
    kept = read_best(directory)
    assert kept is not None
    assert kept.round == 1
    assert os.listdir(tmp_path) == [BEST]
    export.fails = False
    await keeping.take(seen(2, 1.9))
    kept = read_best(directory)
    assert kept is not None
    assert kept.round == 2, "what was not kept is not the best"


async def test_the_best_of_several_trainers_is_exported(tmp_path: Path) -> None:
    for name, loss in (("ann", 2.0), ("bob", 1.0)):
        (tmp_path / name).mkdir()
        await BestAdapter(tmp_path / name / BEST, FakeExport()).take(seen(1, loss))
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
