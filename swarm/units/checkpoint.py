"""A host's units on disk after each round of a run: the last two files are kept, the newest whole state is used."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from blocks.spans import UnitId
from blocks.unit_state import UnitState
from swarm.units.files import Checkpoint, clear_drafts, newest_of, read_whole, write_units

DIRECTORY = "checkpoints"  # in a peer's state directory
KEEP = 2
OWN_INSTEAD = "give this peer another --state"
_NAME = re.compile(r"round-(\d{10})\.safetensors")


def save_checkpoint(directory: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint and remove all but the newest two.

    Raises:
        BadCheckpoint: the disk is full or read-only; what was there stays.
    """
    path = directory / f"round-{checkpoint.round:010d}.safetensors"
    write_units(path, checkpoint)
    with suppress(OSError):  # what cannot be removed only takes space
        # Those of later rounds are torn, or this peer would stand there: they must not take the place of a whole one.
        for old in [each for each in checkpoint_files(directory) if each.name < path.name][KEEP - 1 :]:
            old.unlink(missing_ok=True)
    return path


def load_newest(directory: Path, *, run: str, layout: str) -> Checkpoint | None:
    """The newest whole state of every unit; None when there is none. Torn files are named in the log and passed over.

    Raises:
        BadCheckpoint: a whole one belongs to another run, to other adapter settings or to another version.
    """
    clear_drafts(directory)
    return newest_of(read_whole(checkpoint_files(directory), run=run, layout=layout, instead=OWN_INSTEAD))


def checkpoint_files(directory: Path) -> list[Path]:
    """Checkpoints, newest first."""
    found = [path for path in directory.glob("round-*.safetensors") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name, reverse=True)


def select(units: Mapping[UnitId, UnitState], held: Sequence[UnitId]) -> dict[UnitId, UnitState]:
    """Those of a checkpoint's units that are held now: a peer may come back with another span."""
    return {unit: units[unit] for unit in held if unit in units}
