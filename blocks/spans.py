"""Which consecutive blocks a peer holds, and how the things that are trained are named. Plain values, no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NewType

from blocks.errors import BadSpan

UnitId = NewType("UnitId", str)
"""`ADAPTER/block.12`: one adapter's tensors in one block, the smallest thing that is trained and averaged."""

MAX_BLOCKS = 4096  # far above any published model; bounds what the wire may claim
_UNIT = re.compile(r"([A-Za-z0-9_-]{1,64})/block\.(0|[1-9][0-9]{0,3})")


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Consecutive blocks `[start, end)`.

    Raises:
        BadSpan: negative, empty or absurdly long.
    """

    start: int
    end: int

    def __post_init__(self) -> None:
        # Not blocks.checks, which takes a microsecond: placement makes spans by the thousand.
        are_whole = isinstance(self.start, int) and isinstance(self.end, int)
        if not (are_whole and 0 <= self.start < self.end <= MAX_BLOCKS):
            raise BadSpan(
                f"span {self.start!s:.40}:{self.end!s:.40} is empty or out of range; use START:END with START < END, "
                "whole numbers"
            )

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"

    def __len__(self) -> int:
        return self.end - self.start

    def __contains__(self, block: int) -> bool:
        return self.start <= block < self.end

    def blocks(self) -> range:
        """The block numbers, in order."""
        return range(self.start, self.end)

    def covers(self, other: Span) -> bool:
        """Whether every block of `other` is in this span."""
        return self.start <= other.start and other.end <= self.end


def parse_span(text: str, num_blocks: int) -> Span:
    """Read `A:B` as a person writes it.

    Raises:
        BadSpan: not two numbers, or outside a model of `num_blocks` blocks.
    """
    match = re.fullmatch(r"(\d{1,5}):(\d{1,5})", text.strip())
    if match is None:
        raise BadSpan(f"'{text}' is not a span; use START:END, for example 0:{min(num_blocks, 15)}")
    start, end = int(match[1]), int(match[2])
    if end > num_blocks:
        raise BadSpan(f"span {text} ends after the model's {num_blocks} blocks; use at most 0:{num_blocks}")
    return Span(start, end)


def unit_of(adapter: str, block: int) -> UnitId:
    """The unit of `adapter` in `block`.

    Raises:
        BadSpan: the adapter's name or the block's number cannot be in a unit id.
    """
    unit = f"{adapter}/block.{block}"
    if _UNIT.fullmatch(unit) is None:
        raise BadSpan(f"'{unit}' is not a unit id; adapter names are 1 to 64 letters, digits, '_' or '-'")
    return UnitId(unit)


def parse_unit(text: str) -> tuple[str, int]:
    """The adapter's name and the block of a unit id from outside.

    Raises:
        BadSpan: not a unit id.
    """
    match = _UNIT.fullmatch(text)
    if match is None:
        raise BadSpan(f"'{text[:80]}' is not a unit id such as default/block.12")
    return match[1], int(match[2])
