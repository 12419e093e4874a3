"""How much memory this machine has left and this process takes, as the system says. What follows is in memory.py."""

from __future__ import annotations

import os
from pathlib import Path


def free_bytes() -> int:
    """Memory of this machine that nobody uses now."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def taken_bytes() -> int:
    """What this process occupies now; 0 where the system does not say (it is no Linux)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
