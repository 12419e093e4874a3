"""Paths and lists of names as a script gives them: what may be meant is taken, the rest refused by name."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from blocks.checks import refuse
from swarm.errors import BadConfig


def as_path(name: str, value: object) -> Path:
    """A path from text or a Path; `~/` is the home directory, as in a shell.

    Raises:
        BadConfig: it is neither, or empty.
    """
    if not isinstance(value, (str, os.PathLike)) or not (text := os.fspath(value)) or "\0" in os.fsdecode(text):
        refuse(BadConfig, name, value, "a path")
    path = Path(os.fsdecode(text))
    return path.expanduser() if path.parts[:1] == ("~",) else path


def check_names(name: str, value: object) -> None:
    """Refuse what is no list of texts; one text alone would be taken for a list of letters.

    Raises:
        BadConfig: it is none.
    """
    names = value if isinstance(value, Collection) and not isinstance(value, (str, bytes)) else (None,)
    if not all(isinstance(each, str) for each in names):
        refuse(BadConfig, name, value, "a list of strings")
