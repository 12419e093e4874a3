"""Rules for microbatches on one host: what is open, pending, counted, and when a unit's step is due.

Pure: no clock, no network, no torch. What a host computes of a microbatch is a *piece*: *open* from its forward pass to
its backward pass, *pending* from there to its commit, and then *counted*, once per block, however often it is repeated.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from blocks.spans import Span

REMEMBERED_IDS = 4096  # counted ids kept per trainer's life; older ones are refused, so they cannot count twice
REMEMBERED_LIVES = 256
LIVES_PER_TRAINER = 4  # so that nobody pushes others out of the books by drawing new lives


@dataclass(frozen=True, slots=True, order=True)
class MicrobatchId:
    """Who sent it and where it stands in the sender's work. `life` is drawn anew whenever a trainer starts."""

    trainer: str
    life: int
    step: int
    index: int


@dataclass(frozen=True, slots=True, order=True)
class Piece:
    """Some blocks of one microbatch. When a host dies, a neighbour may have to compute two pieces of the same one."""

    microbatch: MicrobatchId
    span: Span


@dataclass(slots=True)
class _Entry:
    deadline: float
    samples: int
    tokens: int = 0
    is_open: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """Work on one block that a round weighs: committed samples and tokens with a label, and optimizer steps."""

    samples: int = 0
    tokens: int = 0
    steps: int = 0


@dataclass(slots=True)
class Tally:
    """What has been counted for one block since its last step and since its last round; `done_tokens` by this host."""

    samples: int = 0
    tokens: int = 0
    round_samples: int = 0
    round_tokens: int = 0
    round_steps: int = 0
    total_samples: int = 0
    done_tokens: int = 0

    @property
    def since_round(self) -> Counted:
        """What the next round weighs."""
        return Counted(samples=self.round_samples, tokens=self.round_tokens, steps=self.round_steps)


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
        self._entries: dict[Piece, _Entry] = {}
        self._lives: OrderedDict[tuple[str, int], _Life] = OrderedDict()

    @property
    def trained_tokens(self) -> int:
        """Tokens with a label that were counted here, for the block that has seen most."""
        return max(tally.done_tokens for tally in self.tallies.values())

    def open(self, piece: Piece, *, samples: int, deadline: float) -> None:
        """A forward pass was made. A repeated piece replaces what was there."""
        self._entries[piece] = _Entry(deadline=deadline, samples=samples)

    def answer(self, piece: Piece, *, tokens: int, deadline: float) -> None:
        """Its backward pass was made: it is pending until it is committed or `deadline` passes."""
        entry = self._entries[piece]
        entry.is_open, entry.tokens, entry.deadline = False, tokens, deadline

    def is_open(self, piece: Piece) -> bool:
        """Whether its forward pass was made and its backward pass not."""
        entry = self._entries.get(piece)
        return entry is not None and entry.is_open

    def is_pending(self, piece: Piece) -> bool:
        """Whether its gradient waits for a commit."""
        entry = self._entries.get(piece)
        return entry is not None and not entry.is_open

    def is_counted(self, piece: Piece) -> bool:
        """Whether its microbatch was counted for all its blocks, or is too old to tell."""
        microbatch = piece.microbatch
        life = self._lives.get((microbatch.trainer, microbatch.life))
        if life is None:
            return False
        return microbatch.step <= life.forgotten_step or life.counted.get(microbatch, set()).issuperset(
            piece.span.blocks()
        )

    def commit(self, piece: Piece) -> frozenset[int]:
        """Count a pending piece; returns the blocks whose gradients are to be added now (maybe none).

        The caller has checked `is_pending`. A block for which the microbatch was counted before is left out.
        """
        entry, microbatch = self._entries.pop(piece), piece.microbatch
        life = self._life_of(microbatch)
        if microbatch.step <= life.forgotten_step:
            return frozenset()
        before = life.counted.setdefault(microbatch, set())
        fresh = frozenset(piece.span.blocks()) - before
        before |= fresh
        if len(life.counted) > REMEMBERED_IDS:
            oldest, _ = life.counted.popitem(last=False)
            life.forgotten_step = max(life.forgotten_step, oldest.step)
        for block in fresh:
            tally = self.tallies[block]
            tally.samples += entry.samples
            tally.tokens += entry.tokens
            tally.round_samples += entry.samples
            tally.round_tokens += entry.tokens
            tally.total_samples += entry.samples
            tally.done_tokens += entry.tokens
        return fresh

    def drop(self, piece: Piece) -> bool:
        """Forget an open or pending piece; returns whether there was one."""
        return self._entries.pop(piece, None) is not None

    def overdue(self, now: float) -> list[Piece]:
        """Open and pending pieces whose deadline has passed."""
        return [piece for piece, entry in self._entries.items() if entry.deadline <= now]

    def open_pieces(self) -> list[Piece]:
        """Pieces between their forward and their backward pass: no parameter may change under these."""
        return [piece for piece, entry in self._entries.items() if entry.is_open]

    def pieces(self) -> list[Piece]:
        """All open and pending pieces."""
        return list(self._entries)

    def pieces_of(self, microbatch: MicrobatchId) -> list[Piece]:
        """Open and pending pieces of one microbatch."""
        return [piece for piece in self._entries if piece.microbatch == microbatch]

    def due(self) -> list[int]:
        """Blocks whose committed samples have reached the batch size."""
        return [block for block, tally in self.tallies.items() if tally.samples >= self.batch_size]

    def stepped(self, block: int) -> Tally:
        """An optimizer step was made on `block`; returns the tally that it closed."""
        tally = self.tallies[block]
        closed = Tally(samples=tally.samples, tokens=tally.tokens)
        tally.samples = tally.tokens = 0
        tally.round_steps += 1
        return closed

    def made_step(self, *, samples: int, tokens: int) -> None:
        """Whoever trains all of these blocks in a loop of his own made an optimizer step on so much data."""
        for tally in self.tallies.values():
            tally.round_samples += samples
            tally.round_tokens += tokens
            tally.round_steps += 1
            tally.total_samples += samples
            tally.done_tokens += tokens

    def round_done(self, block: int, *, counted: Counted, total_samples: int) -> None:
        """A round was applied to `block`: what it weighed is done, what came since stays for the next."""
        tally = self.tallies[block]
        tally.round_samples = max(0, tally.round_samples - counted.samples)
        tally.round_tokens = max(0, tally.round_tokens - counted.tokens)
        tally.round_steps = max(0, tally.round_steps - counted.steps)
        tally.total_samples = total_samples + tally.round_samples

    def _life_of(self, microbatch: MicrobatchId) -> _Life:
        key = (microbatch.trainer, microbatch.life)
        if key not in self._lives:
            own = [known for known in self._lives if known[0] == microbatch.trainer]
            if len(own) >= LIVES_PER_TRAINER:
                del self._lives[own[0]]
        life = self._lives.setdefault(key, _Life())
        self._lives.move_to_end(key)
        while len(self._lives) > REMEMBERED_LIVES:
            self._lives.popitem(last=False)
        return life
