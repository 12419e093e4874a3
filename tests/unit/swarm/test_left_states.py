"""What dead peers left on disk: the newest of each unit wherever it lies, and one line for what cannot be used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from blocks.spans import UnitId
from swarm.errors import BadCheckpoint
from swarm.units.checkpoint import save_checkpoint
from swarm.units.files import Checkpoint
from swarm.units.kept import KeptStore
from swarm.units.left_states import find_left, gather
from tests.unit.swarm.test_kept import OTHER, UNIT, store, unit_state

THIRD = UnitId("default/block.30")


def leave(state: Path, number: int, *units: UnitId, run: str = "run-1", layout: str = "layout-1") -> Path:
    """A checkpoint in a peer's state directory."""
    states = {unit: unit_state(number, unit) for unit in units}
    return save_checkpoint(state / "checkpoints", Checkpoint(run=run, layout=layout, round=number, units=states))


def rounds(found: Checkpoint | None) -> dict[UnitId, int]:
    return {} if found is None else {unit: state.round for unit, state in found.units.items()}


def left_in(*directories: Path) -> Checkpoint:
    return find_left(directories, run="run-1", layout="layout-1")


def kept_in(state: Path) -> KeptStore:
    return store(state / "kept")


def test_the_newest_of_every_unit_is_found_in_checkpoints_and_kept_stores_of_all(tmp_path: Path) -> None:
    ann, bob = tmp_path / "ann", tmp_path / "bob"
    leave(ann, 3, UNIT, OTHER)
    leave(ann, 4, UNIT)
    leave(bob, 6, THIRD)
    kept_in(bob).put(unit_state(5, OTHER))
    found = left_in(ann, bob)
    assert rounds(found) == {UNIT: 4, OTHER: 5, THIRD: 6}
    assert found.round == 6
    assert rounds(left_in(tmp_path)) == rounds(found), "the directory above them names them all"


def test_a_torn_file_costs_a_round_and_not_the_run(tmp_path: Path) -> None:
    leave(tmp_path, 3, UNIT)
    newest = leave(tmp_path, 4, UNIT)
    newest.write_bytes(newest.read_bytes()[:100])
    assert rounds(left_in(tmp_path)) == {UNIT: 3}


@pytest.mark.parametrize(
    ("other", "words"), [({"run": "run-2"}, "belongs to run run-2, not run-1"), ({"layout": "x"}, "another model")]
)
def test_what_is_not_of_the_run_is_named(tmp_path: Path, other: dict[str, str], words: str) -> None:
    leave(tmp_path / "ann", 3, UNIT)
    leave(tmp_path / "bob", 3, UNIT, **other)
    with pytest.raises(BadCheckpoint, match=f"bob.*{words}.*; leave it out"):
        left_in(tmp_path / "ann", tmp_path / "bob")


def test_a_directory_without_anything_whole_is_named(tmp_path: Path) -> None:
    leave(tmp_path / "ann", 3, UNIT).write_bytes(b"torn")
    with pytest.raises(BadCheckpoint, match=r"none of the 1 files .* is whole"):
        left_in(tmp_path / "ann")
    (tmp_path / "bob").mkdir()
    with pytest.raises(BadCheckpoint, match="bob holds no state of a peer"):
        left_in(tmp_path / "bob")
    with pytest.raises(BadCheckpoint, match="cannot be read"):
        left_in(tmp_path / "cem")
    with pytest.raises(BadCheckpoint, match="no directory was named"):
        left_in()


def test_a_host_starts_from_the_newest_of_its_own_and_others_and_keeps_the_rest(tmp_path: Path) -> None:
    own, dead = tmp_path / "own", tmp_path / "dead"
    leave(own, 3, UNIT, OTHER)
    leave(dead, 5, UNIT)
    kept = kept_in(own)
    kept.put(unit_state(2, UNIT))
    kept.put(unit_state(4, THIRD))
    assert rounds(gather(own, (), kept, [UNIT])) == {UNIT: 3}
    assert {unit: there.version[0] for unit, there in kept.units.items()} == {UNIT: 2, THIRD: 4, OTHER: 3}
    found = gather(own, (dead,), kept, [UNIT, THIRD])
    assert rounds(found) == {UNIT: 5, THIRD: 4}
    assert found is not None
    assert found.round == 5
    assert kept_in(own).units == kept.units, "what it starts from stays on disk until it is checkpointed"


def test_nothing_left_is_a_start_from_the_seed(tmp_path: Path) -> None:
    assert gather(tmp_path, (), kept_in(tmp_path), [UNIT]) is None


def test_units_that_nobody_has_trained_are_not_kept(tmp_path: Path) -> None:
    seed = replace(unit_state(0, OTHER), weight=0.0)
    checkpoint = Checkpoint(run="run-1", layout="layout-1", round=0, units={OTHER: seed, UNIT: unit_state(0)})
    save_checkpoint(tmp_path / "checkpoints", checkpoint)
    kept = kept_in(tmp_path)
    gather(tmp_path, (), kept, [THIRD])
    assert kept.units.keys() == {UNIT}
