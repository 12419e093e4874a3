"""torch's random numbers for a while, as if nobody else drew any.

torch has one generator for a whole process, and peers of one process compute in threads of their own. Unordered they
would draw each other's numbers; and two that read its state at once were seen to wait for each other for good, as that
takes its mutex while the GIL is held.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def forked_rng(seed: int | None = None, device: torch.device | None = None) -> Iterator[None]:
    """What is drawn in here moves nobody else's dice; it begins at `seed` (64 bits), or where the process stands.

    Of the CPU's generator, and that of `device` where it is another one. One thread at a time; others wait.
    """
    kind = "cuda" if device is None or device.type == "cpu" else device.type
    devices = [device] if device is not None and device.type != "cpu" else []
    with _ONE_AT_A_TIME, torch.random.fork_rng(devices=devices, device_type=kind):
        if seed is not None:
            torch.manual_seed(seed)
        yield
