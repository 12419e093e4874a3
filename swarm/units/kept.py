"""Others' units that a peer keeps on disk, one file each, so that they outlive their holders; and how many bytes of it.

Whose units are taken, and which may go, is for keeping.py.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from blocks.spans import UnitId, parse_unit
from blocks.unit_state import UnitState
from swarm.errors import BadCheckpoint
from swarm.units.checkpoint import OWN_INSTEAD
from swarm.units.files import Checkpoint, clear_drafts, read_units, read_whole, write_units

logger = logging.getLogger(__name__)

DIRECTORY = "kept"  # in a peer's state directory
_NAME = re.compile(r"([A-Za-z0-9_-]{1,64})\.block\.(\d{1,4})\.safetensors")


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptUnit:
    """What is kept of one unit: which version, and the size of its file in bytes."""

    version: tuple[int, float, bytes]
    num_bytes: int


class KeptStore:
    """The kept units of one peer in `directory`, at most `most_bytes` of them.

    Methods that read or write files wait for the disk, and may be called from any thread.
    """

    def __init__(self, directory: Path, *, run: str, layout: str, most_bytes: int) -> None:
        self.units: Mapping[UnitId, KeptUnit] = {}
        """Replaced on every change, never changed: safe to read from any thread."""
        self.run, self.layout = run, layout
        self._directory, self._most_bytes = directory, most_bytes
        self._lock = threading.Lock()

    def load(self) -> None:
        """Learn what is there. A torn file is named in the log and passed over.

        Raises:
            BadCheckpoint: a file belongs to another run, or to other adapter settings.
        """
        with self._lock:
            clear_drafts(self._directory)
            found: dict[UnitId, KeptUnit] = {}
            for path in kept_files(self._directory):
                for checkpoint in read_whole([path], run=self.run, layout=self.layout, instead=OWN_INSTEAD):
                    for unit, state in checkpoint.units.items():
                        if self._path(unit) == path:
                            found[unit] = KeptUnit(version=state.version, num_bytes=path.stat().st_size)
            self.units = found

    def checkpoint_of(self, state: UnitState) -> Checkpoint:
        """One unit by itself, as it is written."""
        return Checkpoint(run=self.run, layout=self.layout, round=state.round, units={state.unit: state})

    def is_newer(self, unit: UnitId, version: tuple[int, float, bytes]) -> bool:
        """Whether this version is newer than what is kept of the unit."""
        kept = self.units.get(unit)
        return kept is None or version > kept.version

    @property
    def free_bytes(self) -> int:
        """How much more may be kept; below zero where the limit was lowered."""
        return self._most_bytes - sum(kept.num_bytes for kept in self.units.values())

    def put(self, state: UnitState) -> None:
        """Keep a version, if it is newer than the one that is kept.

        Raises:
            BadCheckpoint: it cannot be written; what was kept of the unit stays.
        """
        with self._lock:
            if not self.is_newer(state.unit, state.version):
                return
            path = self._path(state.unit)
            write_units(path, self.checkpoint_of(state))
            kept = KeptUnit(version=state.version, num_bytes=path.stat().st_size)
            self.units = {**self.units, state.unit: kept}

    def get(self, unit: UnitId) -> UnitState | None:
        """What is kept of a unit; None where nothing is, or where its file was damaged since."""
        with self._lock:
            if unit not in self.units:
                return None
            try:
                return read_units(self._path(unit)).units[unit]
            except (BadCheckpoint, KeyError) as error:
                logger.warning("a kept unit is lost: %s", error)
                self.units = {other: kept for other, kept in self.units.items() if other != unit}
                return None

    def drop(self, unit: UnitId) -> None:
        """Keep a unit no longer."""
        with self._lock:
            with suppress(OSError):  # what cannot be removed only takes space
                self._path(unit).unlink(missing_ok=True)
            self.units = {other: kept for other, kept in self.units.items() if other != unit}

    def _path(self, unit: UnitId) -> Path:
        adapter, block = parse_unit(unit)
        return self._directory / f"{adapter}.block.{block}.safetensors"


def kept_files(directory: Path) -> list[Path]:
    """The files of kept units, in the order of their names."""
    return sorted(path for path in directory.glob("*.safetensors") if _NAME.fullmatch(path.name))
