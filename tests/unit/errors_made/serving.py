"""How to meet the errors of own training loops, of metrics and of a gateway. Each gets an empty directory."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from swarm.commands import run_serve
from swarm.gateway.host_names import LOCAL_NAMES, check_names
from swarm.gateway.keys import NO_LIMITS, read_keys
from swarm.gateway.serve import listen
from swarm.own_loops.hf_trainer import attach
from swarm.own_loops.member import enter
from swarm.reports.run_report import find_metrics
from swarm.reports.trackers import make_tracker
from tests.unit.errors_made.entering import LINE, file_in

TWINS = "".join(f"[{name}]\nkey = '{'k' * 32}'\n" for name in ("ann", "bob"))
MODEL = torch.nn.Linear(1, 1)


def attach_to(*, processes: int = 1, model: object = None) -> None:
    arguments = SimpleNamespace(world_size=processes, n_gpu=0)
    attach(SimpleNamespace(args=arguments, model=model), LINE)  # type: ignore[arg-type]


def enter_by_torchrun(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_world_size", lambda: 2)
        enter(MODEL, LINE)


def track_by(name: str) -> None:
    make_tracker(name, run="tales", peer="bob", state=Path())


def track_without(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)
        track_by("wandb")


def listen_twice(path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen("127.0.0.1", taken.getsockname()[1])


def serve_without(path: Path) -> None:
    """What `swarm serve` says where only the core is installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "swarm.gateway.serve")
        patch.setitem(sys.modules, "uvicorn", None)
        run_serve(None, None)  # type: ignore[arg-type]


def keys_in(path: Path, text: str) -> None:
    read_keys(file_in(path / "keys.toml", text), NO_LIMITS)


MADE: dict[str, Callable[[Path], object]] = {
    "show it one GPU only": lambda path: attach_to(processes=2, model=MODEL),
    "this Trainer has no model yet": lambda path: attach_to(),
    "this loop runs in several processes": enter_by_torchrun,
    "--track … is not known": lambda path: track_by("paper"),
    "--track … needs the package": track_without,
    "has no metrics of peers": find_metrics,
    # A gateway
    "cannot listen on": listen_twice,
    "pip install 'swarmtune[gateway]'": serve_without,
    "the API keys in … cannot be read": lambda path: read_keys(path / "keys.toml", NO_LIMITS),
    "is not valid TOML": lambda path: keys_in(path, "bob = "),
    "the key of '…' in": lambda path: keys_in(path, "[bob]\nkey = 'short'\n"),
    "is no name of this gateway": lambda path: check_names(["evil.example:8000"], LOCAL_NAMES),
    "have the same key": lambda path: keys_in(path, TWINS),
}
