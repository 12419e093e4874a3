"""How a process that is one command, and hosts until it ends, starts quickly. Not for scripts and notebooks."""

from __future__ import annotations

import gc
import importlib

from blocks.lean import import_models
from peers.hivemind_lean import import_hivemind


def begin() -> None:
    """Call it before anything heavy is imported: hivemind comes without what is not used here.

    Collecting garbage is off until `settle`: importing makes half a million objects and hardly any garbage, and each
    full collection looks at all of them.
    """
    gc.disable()
    import_hivemind()


def import_hosting() -> None:
    """Import what computes, in part (blocks.lean)."""
    import_models()
    importlib.import_module("swarm.hosts.hosting")


def settle() -> None:
    """Collect garbage from now on, but never look again at what is here already, so that pauses stay short."""
    gc.freeze()
    gc.enable()
