"""How a process that is one command starts quickly. Not for scripts and notebooks."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager

from blocks.lean import import_models
from peers.hivemind_lean import import_hivemind


@contextmanager
def hosting() -> Iterator[None]:
    """Around a command that hosts until it ends, before anything heavy is imported: hivemind comes without what is not
    used here.

    Collecting garbage is off until `settle`, or until the command fails: importing makes half a million objects and
    hardly any garbage, and each full collection looks at all of them.
    """
    gc.disable()
    try:
        import_hivemind()
        yield
    finally:
        gc.enable()


def import_hosting() -> None:
    """Import what computes, in part (blocks.lean)."""
    import_models()
    importlib.import_module("swarm.hosts.hosting")


def import_client() -> None:
    """Import in part what a command that trains, writes or serves needs, before it imports the whole."""
    import_hivemind()
    import_models()


def settle() -> None:
    """Collect garbage from now on, but never look again at what is here already, so that pauses stay short."""
    gc.freeze()
    gc.enable()
