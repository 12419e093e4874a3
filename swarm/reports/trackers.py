"""Metrics for other programs as they come: TensorBoard's events, Weights & Biases, trackio."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swarm.errors import BadConfig
from swarm.reports.metrics import Entry

if TYPE_CHECKING:
    from swarm.peer import Peer

TRACKERS = ("tensorboard", "wandb", "trackio")
_DIRECTORY = "tensorboard"  # in the state directory


def make_tracker(name: str, *, run: str, peer: str, state: Path) -> tuple[Callable[[Entry], None], Callable[[], None]]:
    """What takes each entry, and what ends it.

    Raises:
        BadConfig: there is no such tracker, or its package is not installed.
    """
    if name not in TRACKERS:
        raise BadConfig(f"--track {name[:40]} is not known; use one of {', '.join(TRACKERS)}")
    package = "torch.utils.tensorboard" if name == "tensorboard" else name
    try:
        module: Any = importlib.import_module(package)
    except ImportError:
        raise BadConfig(f"--track {name} needs the package {name}; pip install {name}") from None
    if name == "tensorboard":
        writer = module.SummaryWriter(str(state / _DIRECTORY))
        return _to_tensorboard(writer), writer.close
    given = {"dir": str(state)} if name == "wandb" else {}
    module.init(project=run, name=peer, **given)
    return lambda entry: module.log(_scalars(entry)), module.finish


@contextmanager
def tracked(peer: Peer, names: Sequence[str]) -> Iterator[None]:
    """Inside, a peer's metrics go to these trackers as well. Raises as `make_tracker` does."""
    node = peer.node
    with ExitStack() as ends:
        for name in names:
            sink, end = make_tracker(name, run=node.spec.name, peer=peer.id, state=node.config.state)
            ends.callback(end)
            node.metrics.sinks.append(sink)
            ends.callback(node.metrics.sinks.remove, sink)
        yield


def _to_tensorboard(writer: Any) -> Callable[[Entry], None]:
    def write(entry: Entry) -> None:
        step = entry.number("step") if entry.kind == "step" else entry.number("round")
        for name, value in _scalars(entry).items():
            writer.add_scalar(name, value, global_step=int(step or 0), walltime=entry.time)

    return write


def _scalars(entry: Entry) -> dict[str, float]:
    numbers = {name: entry.number(name) for name in entry.values}
    return {f"{entry.kind}/{name}": value for name, value in numbers.items() if value is not None}
