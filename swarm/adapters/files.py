"""Published adapters in a host's state directory: a directory for each, with its list of digests and a file a unit.

What is read is checked by that list: a unit is right, or as if it were not here.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from blocks.adapters import unit_digest
from blocks.unit_state import UnitState
from peers.errors import BadRecord
from peers.published.content import read_content, shared_unit
from peers.streams.messages import MAX_CONTENT_BYTES
from swarm.errors import BadCheckpoint
from swarm.units.files import Checkpoint, clear_drafts, read_units, write_units
from swarm.whole_file import replace_file

logger = logging.getLogger(__name__)

DIRECTORY = "published"  # in the state directory
LIST_FILE = "digests"
_UNIT = "block-{}.safetensors"


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """All files are written whole. `blocks` are those in which the run's adapter has a unit, `run` and `layout` those
    of checkpoints. Reading and writing take their time: not on the loop.
    """

    directory: Path
    run: str
    layout: str
    blocks: Sequence[int]

    def listed(self, content: bytes) -> bytes | None:
        """The list of an adapter's digests, if it is here."""
        try:
            with (self._place(content) / LIST_FILE).open("rb") as file:
                listed = file.read(MAX_CONTENT_BYTES + 1)
            read_content(listed, content, self.blocks)
        except FileNotFoundError:
            return None
        except (OSError, BadRecord) as error:
            logger.warning("what is on disk of a published adapter is passed over reason=%s", error)
            return None
        return listed

    def unit(self, content: bytes, block: int) -> UnitState | None:
        """An adapter's unit of a block, if it is here and right."""
        listed = self.listed(content)
        path = self._place(content) / _UNIT.format(block)
        if listed is None or not path.exists():
            return None
        try:
            found = read_units(path)
        except BadCheckpoint as error:
            logger.warning("a unit of a published adapter is passed over: %s", error)
            return None
        state = found.units.get(shared_unit(content, block))
        digests = read_content(listed, content, self.blocks)
        if (found.run, found.layout) != (self.run, self.layout) or state is None:
            return None
        return state if unit_digest(state.tensors) == digests.get(block) else None

    def here(self, content: bytes) -> frozenset[int]:
        """The blocks of which there is a file."""
        return frozenset(block for block in self.blocks if (self._place(content) / _UNIT.format(block)).exists())

    def save_list(self, content: bytes, listed: bytes) -> None:
        """Write an adapter's list of digests, which must be there before its units are of use.

        Raises:
            BadCheckpoint: the disk is full or read-only.
        """
        path = self._place(content) / LIST_FILE
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, listed)
        except OSError as error:
            raise BadCheckpoint(
                f"{path} was not written ({error.strerror}); free space or check its permissions"
            ) from None

    def save_unit(self, content: bytes, block: int, state: UnitState) -> None:
        """Write a unit.

        Raises:
            BadCheckpoint: likewise.
        """
        path = self._place(content) / _UNIT.format(block)
        write_units(path, Checkpoint(run=self.run, layout=self.layout, round=0, units={state.unit: state}))

    def keep_only(self, contents: Collection[bytes]) -> None:
        """Remove all other adapters, and drafts of a process that died."""
        kept = {content.hex() for content in contents}
        with suppress(OSError):  # what cannot be removed only takes space
            for path in self.directory.iterdir() if self.directory.is_dir() else ():
                if path.name in kept:
                    clear_drafts(path)
                elif path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)

    def _place(self, content: bytes) -> Path:
        return self.directory / content.hex()
