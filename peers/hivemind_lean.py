"""Import hivemind without scipy, which it wants for one way of sharing out an all-reduce that is not used here.

For a process of ours, as blocks.lean says; whoever calls that function of hivemind gets scipy then.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from blocks.lean import import_torch, stand_ins


def import_hivemind() -> None:
    """hivemind, and torch that it needs."""
    import_torch()
    with stand_ins(ModuleType("scipy.optimize")):  # scipy itself imports the real one when it is asked for it
        importlib.import_module("hivemind")
