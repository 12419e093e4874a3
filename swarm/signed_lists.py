"""Lists that a run's owner signs, as files in state directories and in the run's own: of those revoked, of adapters."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from peers.owner_list import MAX_LIST_BYTES
from swarm.errors import BadConfig
from swarm.whole_file import replace_file

logger = logging.getLogger(__name__)


def save_list(path: Path, blob: bytes) -> None:
    """Leave a signed list at `path`, replacing an older one whole.

    Raises:
        BadConfig: it cannot be written.
    """
    try:
        replace_file(path, blob)
    except OSError as error:
        raise BadConfig(f"{path} cannot be written ({error.strerror}); free space, or check its owner") from None


def read_lists(directories: Sequence[Path], name: str) -> Iterator[tuple[Path, bytes]]:
    """What lies in the file `name` of each directory, whoever wrote it; of one too long a part that shows it."""
    for directory in directories:
        try:
            with (directory / name).open("rb") as file:
                yield directory, file.read(MAX_LIST_BYTES + 1)
        except FileNotFoundError:
            continue
        except OSError as error:
            logger.warning("%s cannot be read (%s); check its owner", directory / name, error.strerror)
