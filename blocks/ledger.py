"""Rules for microbatches on one host: what is open, pending, counted, and when a unit's step is due.

Pure: no clock, no network, no torch. A microbatch is *open* from its forward pass to its backward pass, *pending* from
there to its commit, and then *counted*, once per block, however often it is repeated.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from blocks.spans import Span

REMEMBERED_IDS = 4096  # counted ids kept per trainer's life; older ones are refused, so they cannot count twice
REMEMBERED_LIVES = 256


@dataclass(frozen=True, slots=True, order=True)
class MicrobatchId:
    """Who sent it and where it stands in the sender's work. `life` is drawn anew whenever a trainer starts."""

    trainer: str
    life: int
    step: int
    index: int


@dataclass(slots=True)
class _Entry:
    span: Span
    deadline: float
    samples: int
    tokens: int = 0
    is_open: bool = True


@dataclass(slots=True)
class Tally:
    """What has been counted for one block since its last step and since its last round."""

    samples: int = 0
    tokens: int = 0
    round_samples: int = 0
    total_samples: int = 0


@dataclass(slots=True)
class _Life:
    """What one trainer's life has counted: blocks per id, newest last, and the step below which all is forgotten."""

    counted: OrderedDict[MicrobatchId, set[int]] = field(default_factory=OrderedDict)
    forgotten_step: int = -1


class Ledger:
    """The books of one host. Callers say what happened; the ledger says what follows."""

    def __init__(self, span: Span, *, batch_size: int) -> None:
        self.span = span
        self.batch_size = batch_size
        self.tallies: dict[int, Tally] = {block: Tally() for block in span.blocks()}
        self._entries: dict[MicrobatchId, _Entry] = {}
        self._lives: OrderedDict[tuple[str, int], _Life] = OrderedDict()

    def open(self, microbatch: MicrobatchId, span: Span, *, samples: int, deadline: float) -> None:
        """A forward pass was made. A repeated id replaces what was there."""
        self._entries[microbatch] = _Entry(span=span, deadline=deadline, samples=samples)

    def answer(self, microbatch: MicrobatchId, *, tokens: int, deadline: float) -> None:
        """Its backward pass was made: it is pending until it is committed or `deadline` passes."""
        entry = self._entries[microbatch]
        entry.is_open, entry.tokens, entry.deadline = False, tokens, deadline

    def is_open(self, microbatch: MicrobatchId) -> bool:
        """Whether its forward pass was made and its backward pass not."""
        entry = self._entries.get(microbatch)
        return entry is not None and entry.is_open

    def is_pending(self, microbatch: MicrobatchId) -> bool:
        """Whether its gradient waits for a commit."""
        entry = self._entries.get(microbatch)
        return entry is not None and not entry.is_open

    def is_counted(self, microbatch: MicrobatchId) -> bool:
        """Whether it was counted for at least one block, or is too old to tell."""
        life = self._lives.get((microbatch.trainer, microbatch.life))
        return life is not None and (microbatch in life.counted or microbatch.step <= life.forgotten_step)

    def commit(self, microbatch: MicrobatchId) -> frozenset[int]:
        """Count a pending microbatch; returns the blocks whose gradients are to be added now (maybe none).

        The caller has checked `is_pending`. A block for which the id was counted before is left out.
        """
        entry = self._entries.pop(microbatch)
        life = self._life_of(microbatch)
        if microbatch.step <= life.forgotten_step:
            return frozenset()
        before = life.counted.setdefault(microbatch, set())
        fresh = frozenset(entry.span.blocks()) - before
        before |= fresh
        if len(life.counted) > REMEMBERED_IDS:
            oldest, _ = life.counted.popitem(last=False)
            life.forgotten_step = max(life.forgotten_step, oldest.step)
        for block in fresh:
            tally = self.tallies[block]
            tally.samples += entry.samples
            tally.tokens += entry.tokens
            tally.round_samples += entry.samples
            tally.total_samples += entry.samples
        return fresh

    def drop(self, microbatch: MicrobatchId) -> bool:
        """Forget an open or pending microbatch; returns whether there was one."""
        return self._entries.pop(microbatch, None) is not None

    def overdue(self, now: float) -> list[MicrobatchId]:
        """Open and pending microbatches whose deadline has passed."""
        return [microbatch for microbatch, entry in self._entries.items() if entry.deadline <= now]

    def open_ids(self) -> list[MicrobatchId]:
        """Microbatches between their forward and their backward pass: no parameter may change under these."""
        return [microbatch for microbatch, entry in self._entries.items() if entry.is_open]

    def of_trainer(self, trainer: str, life: int) -> list[MicrobatchId]:
        """Open and pending microbatches of one life of one trainer."""
        return [m for m in self._entries if (m.trainer, m.life) == (trainer, life)]

    def due(self) -> list[int]:
        """Blocks whose committed samples have reached the batch size."""
        return [block for block, tally in self.tallies.items() if tally.samples >= self.batch_size]

    def stepped(self, block: int) -> Tally:
        """An optimizer step was made on `block`; returns the tally that it closed."""
        tally = self.tallies[block]
        closed = Tally(samples=tally.samples, tokens=tally.tokens)
        tally.samples = tally.tokens = 0
        return closed

    def round_done(self, block: int, *, counted_samples: int, total_samples: int) -> None:
        """A round was applied to `block`: what it weighed is done, what came since stays for the next."""
        tally = self.tallies[block]
        tally.round_samples = max(0, tally.round_samples - counted_samples)
        tally.total_samples = total_samples + tally.round_samples

    def _life_of(self, microbatch: MicrobatchId) -> _Life:
        key = (microbatch.trainer, microbatch.life)
        life = self._lives.setdefault(key, _Life())
        self._lives.move_to_end(key)
        while len(self._lives) > REMEMBERED_LIVES:
            self._lives.popitem(last=False)
        return life
