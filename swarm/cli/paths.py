"""Where things are on this machine: the only place that reads the environment."""

from __future__ import annotations

import os
from pathlib import Path

_PROJECT = "swarmtune"


def state_root() -> Path:
    """`$XDG_DATA_HOME/swarmtune`: identities and checkpoints, by run (https://specifications.freedesktop.org/basedir)."""
    return _base("XDG_DATA_HOME", ".local/share") / _PROJECT


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/swarmtune`: converted models; safe to delete."""
    return _base("XDG_CACHE_HOME", ".cache") / _PROJECT


def _base(variable: str, fallback: str) -> Path:
    chosen = os.environ.get(variable, "")
    return Path(chosen) if Path(chosen).is_absolute() else Path.home() / fallback
