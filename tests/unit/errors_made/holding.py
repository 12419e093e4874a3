"""How to meet the errors of holding blocks. Each gets an empty directory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from blocks.load import load_span
from blocks.spans import Span, parse_span
from swarm.cli import pause
from swarm.devices import pick_device
from swarm.hosts.hours import parse_hours
from swarm.hosts.memory import Allowance
from swarm.hosts.pause_file import say_pause
from swarm.reaching import start_reaching
from swarm.run_rules import lora_settings
from swarm.sizes import parse_memory
from tests.unit.blocks.conftest import CPU
from tests.unit.errors_made.entering import LINE, SPEC, file_in
from tests.unit.errors_made.models import source

MB = 10**6


def allowed(most: int) -> Allowance:
    return Allowance(most_bytes=most, taken_bytes=500 * MB, block_bytes=100 * MB)


def want_cuda(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        pick_device("cuda")


def pause_nobody(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(path))
        patch.setattr(pause, "screen", nullcontext)  # which would make one line of it
        assert pause.command.callback is not None
        pause.command.callback(LINE)


MADE: dict[str, Callable[[Path], object]] = {
    "is not a span; use": lambda path: parse_span("0-15", num_blocks=30),
    "blocks of …; use fewer": lambda path: load_span(source(path), Span(0, 9), dtype=torch.float32, device=CPU),
    "leaves no room for one block": lambda path: allowed(650 * MB).most_blocks(),
    "or fewer --blocks": lambda path: allowed(2500 * MB).check(11),
    "torch finds no CUDA device": want_cuda,
    "this host's rank": lambda path: lora_settings(SPEC, own_rank=3),
    "use a number and a unit": lambda path: parse_memory("4"),
    "use times of day": lambda path: parse_hours("22"),
    "no peer that holds blocks runs here": pause_nobody,
    "nobody can dial this peer": lambda path: asyncio.run(start_reaching(None, list, None)),  # type: ignore[arg-type]
    "pause as the user": lambda path: say_pause(file_in(path / "a", "") / "state"),
}
