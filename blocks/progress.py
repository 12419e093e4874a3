"""Keep transformers quiet while it works for us."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Keep transformers' progress bars off the terminal, which belongs to the command line."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
