"""Units kept for others: newest wins, damage is noticed, another run's are left alone, a full disk harms nothing."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blocks.adapters import unit_digest
from blocks.spans import UnitId
from blocks.unit_state import UnitState, agreed
from swarm.errors import BadCheckpoint
from swarm.units import files as unit_files
from swarm.units.files import Checkpoint, read_units, write_units
from swarm.units.kept import KeptStore

UNIT, OTHER = UnitId("default/block.2"), UnitId("default/block.12")


def unit_state(number: int, unit: UnitId = UNIT, weight: float = 4.0) -> UnitState:
    tensors = {"a.lora_A": torch.full((2, 3), float(number)), "a.lora_B": torch.ones(3, 2)}
    outer = {"velocity/a.lora_A": torch.full((2, 3), 0.5)}
    return UnitState(
        unit=unit,
        round=number,
        weight=weight,
        total_samples=10 * number,
        digest=unit_digest(agreed(tensors, outer)),
        tensors=tensors,
        outer=outer,
        moments={"a.lora_A/exp_avg": torch.zeros(2, 3)},
    )


def store(directory: Path, *, run: str = "run-1", layout: str = "layout-1", most_bytes: int = 1 << 20) -> KeptStore:
    made = KeptStore(directory, run=run, layout=layout, most_bytes=most_bytes)
    made.load()
    return made


def test_what_is_kept_outlives_the_process_to_the_bit(tmp_path: Path) -> None:
    first = store(tmp_path / "kept")
    assert first.units == {}
    wanted = unit_state(3)
    first.put(wanted)
    first.put(unit_state(5, OTHER))
    again = store(tmp_path / "kept")
    assert again.units == first.units
    assert again.units[UNIT].version == wanted.version
    found = again.get(UNIT)
    assert found is not None
    assert (found.version, found.total_samples) == (wanted.version, 30)
    for ours, theirs in ((found.tensors, wanted.tensors), (found.outer, wanted.outer), (found.moments, wanted.moments)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again.drop(UNIT)
    assert again.get(UNIT) is None
    assert store(tmp_path / "kept").units.keys() == {OTHER}


def test_an_older_version_never_takes_a_newer_ones_place(tmp_path: Path) -> None:
    kept = store(tmp_path)
    kept.put(unit_state(3))
    kept.put(unit_state(2, weight=100.0))
    kept.put(unit_state(3, weight=3.0))
    assert kept.units[UNIT].version == unit_state(3).version
    kept.put(unit_state(3, weight=5.0))
    found = store(tmp_path).get(UNIT)
    assert found is not None
    assert (found.round, found.weight) == (3, 5.0)


def test_free_bytes_are_what_the_files_leave_of_the_limit(tmp_path: Path) -> None:
    kept = store(tmp_path, most_bytes=10_000)
    kept.put(unit_state(3))
    (path,) = tmp_path.iterdir()
    assert kept.units[UNIT].num_bytes == path.stat().st_size
    assert kept.free_bytes == 10_000 - path.stat().st_size


def test_a_torn_file_is_named_and_counts_as_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = store(tmp_path)
    kept.put(unit_state(3))
    kept.put(unit_state(3, OTHER))
    path = tmp_path / "default.block.2.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    assert store(tmp_path).units.keys() == {OTHER}
    assert str(path) in caplog.text
    assert kept.get(UNIT) is None, "damaged while the peer runs"
    assert kept.units.keys() == {OTHER}
    kept.put(unit_state(2))
    assert store(tmp_path).units[UNIT].version == unit_state(2).version


def test_a_file_under_another_units_name_is_not_believed(tmp_path: Path) -> None:
    store(tmp_path).put(unit_state(3))
    (tmp_path / "default.block.2.safetensors").rename(tmp_path / "default.block.3.safetensors")
    assert store(tmp_path).units == {}


@pytest.mark.parametrize(("run", "layout"), [("run-2", "layout-1"), ("run-1", "layout-2")])
def test_another_runs_units_are_refused_and_stay(tmp_path: Path, run: str, layout: str) -> None:
    store(tmp_path, run=run, layout=layout).put(unit_state(3))
    before = [path.read_bytes() for path in tmp_path.iterdir()]
    with pytest.raises(BadCheckpoint, match="give this peer another --state"):
        store(tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_refuses_leaves_what_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    kept = store(tmp_path)
    kept.put(unit_state(3))

    def refuse(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(unit_files.os, "fsync", refuse)
    with pytest.raises(BadCheckpoint, match=os.strerror(code)) as refused:
        kept.put(unit_state(4))
    assert "\n" not in str(refused.value)
    assert kept.units[UNIT].version == unit_state(3).version
    assert [path.name for path in tmp_path.iterdir()] == ["default.block.2.safetensors"]
    monkeypatch.undo()
    assert store(tmp_path).units[UNIT].version == unit_state(3).version


@contextmanager
def no_file_past(num_bytes: int) -> Iterator[None]:
    """As on a disk that is full. For the whole process, which writes nothing else of that size meanwhile."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))  # Python ignores the signal
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_does_not_fit_on_the_disk_leaves_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_units(path, Checkpoint(run="r", layout="l", round=3, units={UNIT: unit_state(3)}))
    large = replace(unit_state(4), tensors={"a.lora_A": torch.ones(1000, 1000)})
    checkpoint = Checkpoint(run="r", layout="l", round=4, units={large.unit: large})
    with no_file_past(1 << 21), pytest.raises(BadCheckpoint, match=r"was not written \(File too large\); free space"):
        write_units(path, checkpoint)
    assert read_units(path).round == 3
    assert [each.name for each in tmp_path.iterdir()] == ["x.safetensors"], "half of a file stayed"
