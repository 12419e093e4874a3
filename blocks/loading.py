"""One load by transformers at a time, and quietly."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

# While it loads, transformers swaps methods of its own classes for the whole process (no_tie_weights, the initialisers)
# and puts back what it found: after two loads at the same time no model of the process has its weights tied any more.
_LOADING = threading.RLock()


@contextmanager
def loading() -> Iterator[None]:
    """Let transformers load: alone in this process, and with its progress bars off, as the terminal is not its own."""
    with _LOADING:
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            if shown:
                logging.enable_progress_bar()
