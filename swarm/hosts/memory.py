"""How many blocks a peer takes, and what is left for caches and work in flight; rules over plain numbers of bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from blocks.training.open_work import TrainingLimits
from swarm.errors import BadConfig
from swarm.reports.traffic import size_words

FREE_SHARE = 0.5  # of what is free now, for frozen weights; the rest is for activations and caches
_WEIGHT_SHARE = 0.5  # likewise, of what a person allows
_LEAST_BESIDE_BYTES = 64_000_000  # for caches and work, however small the blocks are
# Of what weights leave. The rest is for what is not budgeted: adapters with their moments, and the pass that runs.
_CACHE_SHARE = 0.25
_STASH_SHARE = 0.25
_HELD_SHARE = 0.5
_ADAPTER_SHARE = 0.125  # for published adapters, which come and go


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """What a host may take beside its weights: bytes for KV caches, the limits of work in flight, and bytes for
    published adapters (None: no bound but what is free).
    """

    cache_bytes: int
    limits: TrainingLimits = field(default_factory=TrainingLimits)
    adapter_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class AdapterRoom:
    """The memory for published adapters: `most_bytes` in all (None: no bound), and half of what is free then."""

    most_bytes: int | None
    free_bytes: Callable[[], int]

    def has(self, num_bytes: int, *, already: int) -> bool:
        """Whether so many bytes fit, beside those that adapters take `already`."""
        is_allowed = self.most_bytes is None or already + num_bytes <= self.most_bytes
        return is_allowed and num_bytes <= self.free_bytes() * FREE_SHARE


@dataclass(frozen=True, kw_only=True, slots=True)
class Allowance:
    """`--max-memory` as it applies: `most_bytes` for the process, which has taken `taken_bytes` before any block.

    `block_bytes` are the frozen weights of the largest block.
    """

    most_bytes: int
    taken_bytes: int
    block_bytes: int

    def most_blocks(self) -> int:
        """How many blocks fit.

        Raises:
            BadConfig: not even one; says how much one needs.
        """
        beside = self.most_bytes - self.taken_bytes
        most = min(int(beside * _WEIGHT_SHARE), beside - _LEAST_BESIDE_BYTES) // max(1, self.block_bytes)
        if most < 1:
            raise BadConfig(
                f"--max-memory {size_words(self.most_bytes)} leaves no room for one block: it needs "
                f"{self._needs(1)}; give at least {size_words(_up(self._total(1)))}, or try --quantize"
            )
        return most

    def check(self, num_blocks: int) -> None:
        """Refuse a span that a person chose and that does not fit.

        Raises:
            BadConfig: says how much it needs, and how many blocks would fit.
        """
        most = self.most_blocks()
        if num_blocks > most:
            raise BadConfig(
                f"--max-memory {size_words(self.most_bytes)} has room for {most} blocks, not for {num_blocks}: they "
                f"need {self._needs(num_blocks)}; give at least {size_words(_up(self._total(num_blocks)))}, or fewer "
                "--blocks"
            )

    def room(self, num_blocks: int, wanted: Room) -> Room:
        """Budgets beside so many blocks; at most those that are wanted.

        Raises:
            BadConfig: so many blocks do not fit.
        """
        self.check(num_blocks)
        left = self.most_bytes - self.taken_bytes - num_blocks * self.block_bytes
        limits = replace(
            wanted.limits,
            stash_bytes=min(wanted.limits.stash_bytes, int(left * _STASH_SHARE)),
            held_bytes=min(wanted.limits.held_bytes, int(left * _HELD_SHARE)),
        )
        return Room(
            cache_bytes=min(wanted.cache_bytes, int(left * _CACHE_SHARE)),
            limits=limits,
            adapter_bytes=int(left * _ADAPTER_SHARE),
        )

    def _work(self, num_blocks: int) -> int:
        """What must be left beside so many blocks."""
        weights = num_blocks * self.block_bytes
        return max(_LEAST_BESIDE_BYTES, int(weights / _WEIGHT_SHARE) - weights)

    def _total(self, num_blocks: int) -> int:
        return self.taken_bytes + num_blocks * self.block_bytes + self._work(num_blocks)

    def _needs(self, num_blocks: int) -> str:
        return (
            f"{size_words(num_blocks * self.block_bytes)} for weights and {size_words(self._work(num_blocks))} for "
            f"caches and work, beside the {size_words(self.taken_bytes)} of the program itself"
        )


def affordable(free_bytes: int, block_bytes: int, num_blocks: int) -> int:
    """How many blocks fit in half of the free memory; at least one, at most all."""
    return max(1, min(num_blocks, int(free_bytes * FREE_SHARE) // max(1, block_bytes)))


def _up(num_bytes: int) -> int:
    """A little more, so that the number as it is printed, with three digits, is enough."""
    return int(num_bytes * 1.01)
