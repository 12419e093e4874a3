"""The adapter that is best on held-out rows so far, kept as a peft directory in its trainer's state directory.

What counts is the loss over the rows of all trainers that measure. They come and go, and so do their rows: two adapters
are compared by the rows of those who have measured both.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blocks.errors import BadAdapter
from blocks.export import check_place
from peers.errors import NoRoute
from swarm.errors import BadCheckpoint
from swarm.training.evaluation_sums import Evaluation

logger = logging.getLogger(__name__)

BEST = "best"  # in a trainer's state directory
_ADAPTER = "adapter_config.json"
_NOTE = "validation.json"
_MAX_BYTES = 1 << 16
_MAX_PEERS = 256  # in the note; a line of it has about a hundred bytes
_MOST_DRAFTS = 3

Parts = Mapping[str, tuple[float, int]]
"""Summed loss in nats, and tokens, of each peer's rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """A kept adapter: the round that made it, its held-out loss (mean per token, nats), and whose rows say so."""

    directory: Path
    round: int
    loss: float
    parts: Parts = field(default_factory=dict)


class BestAdapter:
    """Keeps the best adapter that a trainer evaluates in `directory`. `export` writes the run's newest one and returns
    its round.

    What all rows say of an adapter is known a while after it was measured, when a next round may have replaced it: so
    `fetch` it at once, and `settle` once its loss is known.
    """

    def __init__(self, directory: Path, export: Callable[[Path], Awaitable[int]]) -> None:
        self._directory, self._export = directory, export
        self._kept = read_best(directory)
        self._drafts: dict[int, Path] = {}
        self._drop(*directory.parent.glob(f".{directory.name}-*"))

    async def fetch(self, number: int) -> None:
        """Get the adapter of round `number`, which the run stands at. The one of no round yet is not kept.

        What cannot be fetched or written is named in the log: training goes on. An adapter that a round has replaced
        since it was measured is not kept.
        """
        if number < 1 or number in self._drafts:
            return
        draft = self._directory.with_name(f".{self._directory.name}-{number}")
        try:
            found = await self._export(draft)
        except (NoRoute, BadAdapter, OSError) as error:
            logger.warning("the adapter of round %d is not kept, should it be the best: %s", number, error)
            self._drop(draft)
            return
        if found != number:
            logger.info("the adapter of round %d was replaced by round %d before it was kept", number, found)
            self._drop(draft)
            return
        self._drafts[number] = draft
        while len(self._drafts) > _MOST_DRAFTS:
            self._drop(self._drafts.pop(min(self._drafts)))

    def is_better(self, found: Evaluation, parts: Parts) -> bool:
        """Whether an adapter with these losses is better than the one that is kept."""
        kept = self._kept
        if kept is None or not kept.parts:
            return kept is None or found.loss < kept.loss
        both = [peer for peer, (_, tokens) in parts.items() if peer in kept.parts and kept.parts[peer][1] == tokens]
        if not both:  # other rows than ever before: nothing speaks for the old one
            return math.isfinite(found.loss)
        return math.fsum(parts[peer][0] for peer in both) < math.fsum(kept.parts[peer][0] for peer in both)

    def settle(self, found: Evaluation, parts: Parts) -> None:
        """Keep the adapter of this evaluation if it was fetched and is the best; `parts` are behind the evaluation."""
        draft = self._drafts.pop(found.round, None)
        if draft is None:
            return
        try:
            if self.is_better(found, parts):
                self._keep(draft, found, dict(list(parts.items())[:_MAX_PEERS]))
        except OSError as error:
            logger.warning("the adapter of round %d, the best so far, is not kept: %s", found.round, error)
        finally:
            self._drop(draft)

    def close(self) -> None:
        """Remove what was fetched and not settled."""
        self._drop(*self._drafts.values())
        self._drafts.clear()

    def _keep(self, draft: Path, found: Evaluation, parts: Parts) -> None:
        note = {"round": found.round, "loss": found.loss, "peers": parts}
        (draft / _NOTE).write_text(json.dumps(note))
        shutil.rmtree(self._directory, ignore_errors=True)
        draft.rename(self._directory)
        self._kept = Best(directory=self._directory, round=found.round, loss=found.loss, parts=parts)
        logger.info("best adapter kept round=%d loss=%.4f peers=%d", found.round, found.loss, len(parts))

    def _drop(self, *drafts: Path) -> None:
        for draft in drafts:
            shutil.rmtree(draft, ignore_errors=True)


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
                parts = _parts_in(found.get("peers"))
                return Best(directory=directory, round=number, loss=float(loss), parts=parts)
    return None


def _parts_in(found: object) -> Parts:
    """None at all where they make no sense: the loss is kept apart from them."""
    parts: dict[str, tuple[float, int]] = {}
    for peer, part in found.items() if isinstance(found, dict) else ():
        match part:
            case [int(loss) | float(loss), int(tokens)] if math.isfinite(loss):
                parts[str(peer)] = float(loss), tokens
            case _:
                return {}
    return parts


def export_best(states: Sequence[Path], directory: Path) -> Best:
    """Copy the best adapter that trainers with these state directories have kept to `directory`, new or empty, or that
    of an adapter.

    Raises:
        BadCheckpoint: none is kept, or it cannot be written.
        BadAdapter: the directory holds other files.
    """
    kept = [best for best in (read_best(state / BEST) for state in states) if best is not None]
    if not kept:
        raise BadCheckpoint(
            "no best adapter is kept on this machine; train with --eval-data first, or name that trainer's --state"
        )
    best = min(kept, key=lambda each: (each.loss, each.round))
    check_place(directory)
    try:
        shutil.copytree(best.directory, directory, dirs_exist_ok=True)
    except OSError as error:
        raise BadCheckpoint(
            f"cannot write the adapter to {directory} ({error.strerror or error}); free space or name another directory"
        ) from None
    return best
