"""How to meet the errors of texts, rounds and exports. Each gets an empty directory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from averaging import signing
from averaging.robust import Segment, combine
from blocks.spans import Span
from peers.identity import verify
from peers.network import PeerId
from peers.routes.routing import HostView, pick_fast
from peers.streams.calls import Question
from peers.streams.messages import OpenLane
from peers.streams.send_limit import SendLimit
from peers.streams.work_gate import WorkGate
from swarm.demo import run_demo
from swarm.hosts.pausing import Withdrawal
from swarm.interrupt import Interrupt
from swarm.join_string import parse_join
from swarm.model import RemoteBlocks
from swarm.options import DemoOptions
from swarm.training.best_adapter import export_best
from swarm.units import checkpoint
from swarm.units.checkpoint import checkpoint_files, save_checkpoint
from swarm.units.files import Checkpoint, write_units
from swarm.units.left_states import find_left, left_settings
from tests.unit.errors_made.entering import LINE, RUN, file_in
from tests.unit.swarm.test_kept import UNIT, unit_state
from tests.unit.swarm.test_stepping_back import SHORT, Parts

BOB = PeerId("bob")
NOBODY: Any = SimpleNamespace()  # a screen on which nothing is shown
HALF = HostView(peer=BOB, span=Span(0, 3), tokens_per_second=100.0, queue_seconds=0.0, rtt_seconds=0.01)


def hang_up(path: Path) -> None:
    interrupt = Interrupt()
    interrupt.set()
    with asyncio.Runner() as runner:
        interrupt.wait(asyncio.sleep(0), runner.get_loop())


async def ask_the_paused() -> None:
    parts, gate = Parts(), WorkGate(SimpleNamespace(), BOB, SendLimit())  # type: ignore[arg-type]
    await Withdrawal(replace(parts.build(), train=gate)).step_back("hand", SHORT)
    question = OpenLane(lane="l", span=Span(0, 1))
    await gate.answer(Question(peer=PeerId("ann"), stream=1, message=question))


def one_pass(path: Path) -> None:
    blocks = object.__new__(RemoteBlocks)  # refused before anything of it is used
    blocks(SimpleNamespace(cached=False))  # type: ignore[arg-type]


def write_on_a_file(path: Path) -> None:
    """Where a directory should be, somebody has put a file."""
    write_units(file_in(path / "kept", "") / "a.safetensors", Checkpoint(run=RUN, layout="l", round=1, units={}))


def left_by(path: Path, run: str = RUN) -> Path:
    """The state directory of a peer that has ended."""
    save_checkpoint(path / checkpoint.DIRECTORY, Checkpoint(run=run, layout="l", round=1, units={UNIT: unit_state(1)}))
    return path


def left_torn(path: Path) -> Path:
    for file in checkpoint_files(left_by(path) / checkpoint.DIRECTORY):
        file.write_bytes(b"torn")
    return path


MADE: dict[str, Callable[[Path], object]] = {
    "no live host": lambda path: pick_fast([HALF], Span(0, 6)),
    "the text was ended before it was complete": hang_up,
    "this host is paused": lambda path: asyncio.run(ask_the_paused()),
    "a pass without a cache": one_pass,
    "holders with samples and found": lambda path: combine("krum", [torch.ones(4)], [Segment(0, 4, (1.0,))]),
    "contribution of … is refused": lambda path: signing.parse(b"nonsense", peer=BOB, run=RUN, verify=verify),
    "holds no state of a peer": lambda path: find_left([path], run=RUN, layout="l"),
    "no best adapter is kept": lambda path: export_best([path], path / "out"),
    "… belongs to run": lambda path: find_left((left_by(path, run="other"),), run=RUN, layout="l"),
    "was made with other adapter settings": lambda path: find_left((left_by(path),), run=RUN, layout="other"),
    "files of units in … is whole": lambda path: find_left((left_torn(path),), run=RUN, layout="l"),
    "no directory given holds the settings": lambda path: left_settings(parse_join(LINE), (path,)),
    "checkpoint … was not written": write_on_a_file,
    "choose another --directory or --json": lambda path: run_demo(DemoOptions(cache_dir=path, json_file=path), NOBODY),
}
