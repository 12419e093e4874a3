"""What a host keeps of microbatches until they are counted or dropped, beside the ledger's books. Computes nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from blocks.compute import Stash, UnitGradients
from blocks.errors import BadSession, Busy
from blocks.training.ledger import Ledger, Piece

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingLimits:
    """How long and how much a host keeps for others.

    `open_seconds`: from a forward to its backward; `pending_seconds`: from a backward to its commit;
    `drain_seconds`: how long a step or a round waits for open stashes before it drops them. Above `stash_bytes` of
    stashes graphs are computed again instead of kept; above `held_bytes` of inputs, graphs and uncommitted gradients
    together new forwards are refused.
    """

    open_seconds: float = 120.0
    pending_seconds: float = 120.0
    drain_seconds: float = 20.0
    stash_bytes: int = 2 << 30
    held_bytes: int = 4 << 30
    max_open: int = 256

    def __post_init__(self) -> None:
        positive = min(self.open_seconds, self.pending_seconds, self.drain_seconds, self.held_bytes, self.max_open)
        if positive <= 0 or self.stash_bytes < 0:
            raise ValueError("training limits must be positive")


@dataclass(eq=False, slots=True)
class Kept:
    """What one forward pass left here. Compared by identity: a repeated forward makes another."""

    num_bytes: int
    stash: Stash | None = None
    gradients: UnitGradients | None = None


class OpenWork:
    """Stashes and pending gradients by piece, always in step with the ledger. Belongs to the event loop."""

    def __init__(self, ledger: Ledger, limits: TrainingLimits, clock: Callable[[], float]) -> None:
        self.dropped = 0
        self._ledger, self._limits, self._clock = ledger, limits, clock
        self._kept: dict[Piece, Kept] = {}
        self._changed = asyncio.Event()

    def open(self, piece: Piece, hidden_BTD: torch.Tensor, *, samples: int) -> Kept:
        """A forward pass begins; one of the same piece before it is forgotten.

        Raises:
            Busy: too many microbatches are open, or too much memory is held for them.
        """
        held = sum(kept.num_bytes for kept in self._kept.values())
        if len(self._ledger.open_pieces()) >= self._limits.max_open or held >= self._limits.held_bytes:
            raise Busy(
                f"{len(self._kept)} microbatches ({held >> 20} MiB) are held here; commit or drop some, or try later"
            )
        self.forget(piece)
        self._ledger.open(piece, samples=samples, deadline=self._clock() + self._limits.open_seconds)
        kept = self._kept[piece] = Kept(num_bytes=_num_bytes([hidden_BTD]))
        return kept

    def take_stash(self, piece: Piece) -> tuple[Kept, Stash]:
        """What a backward pass needs; a second one finds nothing.

        Raises:
            BadSession: no such piece is open here.
        """
        kept = self._kept.get(piece)
        if kept is None or kept.stash is None:
            raise BadSession("no such microbatch is open here (dropped, or never sent); send its forward again")
        stash, kept.stash = kept.stash, None
        return kept, stash

    def answer(self, piece: Piece, kept: Kept, gradients: UnitGradients, *, tokens: int) -> None:
        """The backward pass is done: its gradients are pending.

        Raises:
            BadSession: the piece was dropped or begun again meanwhile.
        """
        self.check(piece, kept)
        self._ledger.answer(piece, tokens=tokens, deadline=self._clock() + self._limits.pending_seconds)
        kept.gradients = gradients
        kept.num_bytes = sum(_num_bytes(named.values()) for named in gradients.values())
        self._changed.set()

    def commit(self, piece: Piece) -> tuple[frozenset[int], UnitGradients]:
        """Count a pending piece: the blocks for which it is new (see Ledger.commit), and its gradients."""
        return self._ledger.commit(piece), self._kept.pop(piece).gradients or {}

    def check(self, piece: Piece, kept: Kept) -> None:
        """Whether `kept` still stands. Safe in the compute thread.

        Raises:
            BadSession: the piece was dropped or begun again.
        """
        if self._kept.get(piece) is not kept:
            raise BadSession("the microbatch was dropped (a step could not wait longer) or sent twice; send it again")

    def stash_bytes(self) -> int:
        """Bytes of all stashes. Safe in the compute thread."""
        return sum(kept.num_bytes for kept in list(self._kept.values()) if kept.stash is not None)

    @contextmanager
    def unless_failed(self, piece: Piece, kept: Kept) -> Iterator[None]:
        """Forget the piece if its pass fails or is cancelled, but not one that was begun again meanwhile."""
        try:
            yield
        except BaseException:
            if self._kept.get(piece) is kept:
                self.forget(piece)
            raise

    def forget(self, piece: Piece) -> None:
        """Drop a piece, open or pending, if there is one."""
        self._kept.pop(piece, None)
        if self._ledger.drop(piece):
            self.dropped += 1
        self._changed.set()

    def sweep(self) -> None:
        """Drop what is overdue."""
        for piece in self._ledger.overdue(self._clock()):
            microbatch = piece.microbatch
            logger.warning("dropped overdue microbatch trainer=%s step=%d", microbatch.trainer, microbatch.step)
            self.forget(piece)

    async def drained(self) -> None:
        """Wait until nothing is open; after `drain_seconds` the late are dropped."""
        deadline = self._clock() + self._limits.drain_seconds
        while self._ledger.open_pieces():
            self._changed.clear()
            try:
                async with asyncio.timeout(max(0.0, deadline - self._clock())):
                    await self._changed.wait()
            except TimeoutError:
                late = self._ledger.open_pieces()
                logger.warning("dropped late microbatches count=%d waited=%.0fs", len(late), self._limits.drain_seconds)
                for piece in late:
                    self.forget(piece)


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
