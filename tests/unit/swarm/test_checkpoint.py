"""Checkpoints against torn writes, flipped bits, other runs and full disks: the last whole one is used."""

from __future__ import annotations

import errno
import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from blocks.spans import UnitId
from blocks.unit_state import UnitState
from swarm.errors import BadCheckpoint
from swarm.units import files as module
from swarm.units.checkpoint import load_newest, save_checkpoint, select
from swarm.units.files import Checkpoint
from tests.errors_page import met

UNITS = [UnitId("default/block.1"), UnitId("default/block.12")]


def make(number: int, *, run: str = "run-1", layout: str = "layout-1") -> Checkpoint:
    flat = torch.arange(20, dtype=torch.float32) + number
    return Checkpoint(
        run=run,
        layout=layout,
        round=number,
        units={
            unit: UnitState(
                unit=unit,
                round=number,
                weight=2.5,
                total_samples=10 * number,
                digest=bytes(range(32)),
                tensors={"a.A": flat[:6].view(2, 3), "a.B": flat[6:12].view(2, 3).T},  # views of one buffer
                moments={"a.A/exp_avg": flat[12:15], "a.A/step": torch.tensor([3.0])},
            )
            for unit in UNITS
        },
    )


def load(directory: Path) -> Checkpoint | None:
    return load_newest(directory, run="run-1", layout="layout-1")


def round_of(directory: Path) -> int:
    found = load(directory)
    assert found is not None
    return found.round


def test_a_checkpoint_comes_back_to_the_bit(tmp_path: Path) -> None:
    assert load(tmp_path / "none") is None
    want = make(7)
    save_checkpoint(tmp_path / "deep" / "er", want)
    got = load(tmp_path / "deep" / "er")
    assert got is not None
    assert (got.run, got.layout, got.round) == (want.run, want.layout, want.round)
    assert list(got.units) == UNITS
    for unit, state in want.units.items():
        found = got.units[unit]
        assert (found.version, found.total_samples) == (state.version, state.total_samples)
        for ours, theirs in ((found.tensors, state.tensors), (found.moments, state.moments)):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert select(got.units, [UNITS[1], UnitId("default/block.3")]).keys() == {UNITS[1]}


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for number in (1, 2, 3, 10):
        save_checkpoint(tmp_path, make(number))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "round-0000000003.safetensors",
        "round-0000000010.safetensors",
    ]


def test_a_torn_one_of_a_later_round_does_not_take_the_place_of_a_whole_one(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make(4))
    save_checkpoint(tmp_path, make(5)).write_bytes(b"torn")
    for number in (4, 3):  # a peer that stood at 4, and one that had to go back further
        save_checkpoint(tmp_path, make(number))
    save_checkpoint(tmp_path, make(4)).write_bytes(b"torn")
    assert round_of(tmp_path) == 3


def test_the_one_just_written_is_never_removed(tmp_path: Path) -> None:
    for number in (98, 99):
        save_checkpoint(tmp_path, make(number)).write_bytes(b"torn")
    save_checkpoint(tmp_path, make(1))
    assert round_of(tmp_path) == 1


def damage_cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def damage_flip(data: bytes) -> bytes:
    return data[:300] + bytes([data[300] ^ 1]) + data[301:]


def damage_checksum(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def damage_more(data: bytes) -> bytes:
    return data + b"x"


def damage_empty(data: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [damage_cut, damage_flip, damage_checksum, damage_more, damage_empty])
def test_a_damaged_one_is_named_and_the_one_before_it_used(
    tmp_path: Path, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(tmp_path, make(1))
    path = save_checkpoint(tmp_path, make(2))
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert round_of(tmp_path) == 1
    assert str(path) in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"units": "no json"},
        {"units": json.dumps({"../x": [1, 1.0, 1, "00"]})},
        {"units": json.dumps({"default/block.1": [1]})},
        {"units": '{"default/block.1": [Infinity, 1.0, 1, "00"]}'},
        {"units": "[]"},
        {"round": "one"},
    ],
    ids=str,
)
def test_a_whole_but_malformed_one_is_passed_over(tmp_path: Path, change: dict[str, str]) -> None:
    save_checkpoint(tmp_path, make(1))
    metadata = {"format": "swarmtune checkpoint 1", "run": "run-1", "layout": "layout-1", "round": "2", "units": "{}"}
    data = save({"x": torch.ones(1)}, metadata | change)
    (tmp_path / "round-0000000002.safetensors").write_bytes(data + module.hashlib.sha256(data).digest())
    assert round_of(tmp_path) == 1


def test_another_run_or_layout_is_refused_not_overwritten(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make(1, run="run-2"))
    with pytest.raises(BadCheckpoint, match="belongs to run run-2"):
        load(tmp_path)
    save_checkpoint(tmp_path, make(2, layout="layout-2"))
    with pytest.raises(BadCheckpoint, match="other adapter settings"):
        load(tmp_path)


def test_one_of_a_later_version_is_refused_and_stays(tmp_path: Path) -> None:
    """It is whole: to start from what is older would write over what was learnt since."""
    save_checkpoint(tmp_path, make(1))
    metadata = {"format": "swarmtune checkpoint 99"}
    data = save({"x": torch.ones(1)}, metadata)
    newer = tmp_path / "round-0000000002.safetensors"
    newer.write_bytes(data + module.hashlib.sha256(data).digest())
    with pytest.raises(BadCheckpoint) as caught:
        load(tmp_path)
    met("update swarmtune, or", caught.value)
    assert newer.exists()


def test_the_file_and_then_its_name_are_on_the_disk_before_an_older_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        save_checkpoint(tmp_path / "deep", make(number))
    did: list[str] = []
    really_sync, really_replace, really_unlink = os.fsync, Path.replace, Path.unlink

    def fsync(handle: int) -> None:
        did.append("directory" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        really_sync(handle)

    def replace_(path: Path, target: Path) -> Path:
        did.append("name")
        return really_replace(path, target)

    def unlink(path: Path, missing_ok: bool = False) -> None:
        did.append(path.name)
        really_unlink(path, missing_ok)

    monkeypatch.setattr(module.os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace_)
    monkeypatch.setattr(Path, "unlink", unlink)
    save_checkpoint(tmp_path / "deep", make(3))
    assert did == ["file", "name", "directory", "round-0000000001.safetensors"]
    did.clear()
    save_checkpoint(tmp_path / "new", make(1))
    assert did == ["directory", "file", "name", "directory"], "a new directory is a name, too"


def test_a_disk_that_cannot_sync_directories_is_used_and_one_that_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = errno.EINVAL

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module.os, "fsync", fsync)
    save_checkpoint(tmp_path, make(1))
    assert round_of(tmp_path) == 1
    code = errno.EIO
    with pytest.raises(BadCheckpoint, match="Input/output error"):
        save_checkpoint(tmp_path, make(2))
    assert (tmp_path / "round-0000000001.safetensors").exists(), "the older one went before the newer one was sure"


def test_a_write_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, make(1))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(BadCheckpoint, match="No space left"):
        save_checkpoint(tmp_path, make(2))
    assert [path.name for path in tmp_path.iterdir()] == ["round-0000000001.safetensors"]
    assert round_of(tmp_path) == 1


def test_a_directory_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(BadCheckpoint, match="not written"):
        save_checkpoint(tmp_path / "file", make(1))
    save_checkpoint(tmp_path, make(1))

    def read_only(*_: object, **__: object) -> None:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(Path, "open", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(BadCheckpoint, match="Read-only"):
        save_checkpoint(tmp_path, make(2))
    monkeypatch.undo()
    assert round_of(tmp_path) == 1


def test_drafts_of_dead_processes_are_cleared_away(tmp_path: Path) -> None:
    draft = tmp_path / ".round-0000000001.safetensors.4242"
    draft.write_bytes(b"half")
    assert load(tmp_path) is None
    assert not draft.exists()


def test_units_of_an_earlier_span_are_still_found(tmp_path: Path) -> None:
    front, back = make(3), make(4)
    save_checkpoint(
        tmp_path, Checkpoint(run="run-1", layout="layout-1", round=3, units={UNITS[0]: front.units[UNITS[0]]})
    )
    save_checkpoint(
        tmp_path, Checkpoint(run="run-1", layout="layout-1", round=4, units={UNITS[1]: back.units[UNITS[1]]})
    )
    found = load(tmp_path)
    assert found is not None
    assert (found.round, {unit: state.round for unit, state in found.units.items()}) == (4, {UNITS[0]: 3, UNITS[1]: 4})


def test_of_each_unit_the_newest_version_counts_not_the_newest_file(tmp_path: Path) -> None:
    checkpoint = make(3)
    save_checkpoint(tmp_path, checkpoint)
    older = make(2).units[UNITS[0]]
    save_checkpoint(tmp_path, replace(checkpoint, round=4, units={UNITS[0]: older}))
    found = load(tmp_path)
    assert found is not None
    assert found.units[UNITS[0]].version == checkpoint.units[UNITS[0]].version
