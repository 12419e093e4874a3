"""The adapter with the lowest held-out loss so far, kept as a peft directory in its trainer's state directory."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from blocks.errors import BadAdapter
from peers.errors import NoRoute
from swarm.errors import BadCheckpoint
from swarm.train import Evaluation

logger = logging.getLogger(__name__)

BEST = "best"  # in a trainer's state directory
_ADAPTER = "adapter_config.json"
_NOTE = "validation.json"
_MAX_BYTES = 1 << 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """A kept adapter: the round that made it, and its held-out loss (mean per token, nats)."""

    directory: Path
    round: int
    loss: float


class BestAdapter:
    """Keeps the best adapter that a trainer evaluates in `directory`. `export` writes the run's newest one and returns
    its round.
    """

    def __init__(self, directory: Path, export: Callable[[Path], Awaitable[int]]) -> None:
        self._directory, self._export = directory, export
        kept = read_best(directory)
        self._loss = math.inf if kept is None else kept.loss

    async def take(self, found: Evaluation) -> None:
        """Keep the adapter of this evaluation if its loss is the lowest; the one of no round yet is not kept.

        What cannot be fetched or written is named in the log: training goes on. An adapter that a round has replaced
        since it was evaluated is not kept, as its own loss is not known.
        """
        if found.round < 1 or not found.loss < self._loss:
            return
        draft = self._directory.with_name(f".{self._directory.name}-new")
        try:
            number = await self._export(draft)
            if number != found.round:
                logger.info(
                    "the best adapter was replaced by round %d before it was kept, of round %d", number, found.round
                )
                return
            (draft / _NOTE).write_text(json.dumps({"round": found.round, "loss": found.loss}))
            shutil.rmtree(self._directory, ignore_errors=True)
            draft.rename(self._directory)
        except (NoRoute, BadAdapter, OSError) as error:
            logger.warning("the adapter of round %d, the best so far, is not kept: %s", found.round, error)
            return
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        self._loss = found.loss
        logger.info("best adapter kept round=%d loss=%.4f", found.round, found.loss)


def read_best(directory: Path) -> Best | None:
    """What is kept in a directory, if anything is, and whole."""
    try:
        with (directory / _NOTE).open("rb") as file:
            found = json.loads(file.read(_MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    match found:
        case {"round": int(number), "loss": int(loss) | float(loss)} if number >= 0 and math.isfinite(loss):
            if (directory / _ADAPTER).is_file():
                return Best(directory=directory, round=number, loss=float(loss))
    return None


def export_best(states: Sequence[Path], directory: Path) -> Best:
    """Copy the best adapter that trainers with these state directories have kept to `directory`, new or empty, or that
    of an adapter.

    Raises:
        BadCheckpoint: none is kept, or it cannot be written.
    """
    kept = [best for best in (read_best(state / BEST) for state in states) if best is not None]
    if not kept:
        raise BadCheckpoint(
            "no best adapter is kept on this machine; train with --eval-data first, or name that trainer's --state"
        )
    best = min(kept, key=lambda each: (each.loss, each.round))
    if directory.exists() and not (directory / _ADAPTER).is_file() and any(directory.iterdir()):
        raise BadCheckpoint(f"{directory} is not empty and holds no adapter; name another directory")
    try:
        shutil.copytree(best.directory, directory, dirs_exist_ok=True)
    except OSError as error:
        raise BadCheckpoint(
            f"cannot write the adapter to {directory} ({error.strerror or error}); free space or name another directory"
        ) from None
    return best
