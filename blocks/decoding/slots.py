"""Storage for the keys and values of many sessions, in rows of equal capacity, so that one pass can read all of them.

A pool holds rows of one capacity for the blocks of one span; capacities are powers of two, and a session moves to the
next pool when it outgrows its own, so that at most half of what it holds is unused. Knows nothing of what sessions may
do (cache.py), nor of attention (slot_view.py). H: heads, C: positions, D: size of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from blocks.spans import Span

_SMALLEST_CAPACITY = 16


def capacity_for(positions: int) -> int:
    """The capacity of the rows that a session of so many positions gets: the next power of two, at least 16."""
    return max(_SMALLEST_CAPACITY, 1 << (positions - 1).bit_length())


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerShape:
    """What one block caches for a position: heads and head size of keys and values; `window` if attention slides."""

    key_HD: tuple[int, int]
    value_HD: tuple[int, int]
    dtype: torch.dtype
    window: int | None

    @property
    def num_bytes(self) -> int:
        """Of one position of one row."""
        return (self.key_HD[0] * self.key_HD[1] + self.value_HD[0] * self.value_HD[1]) * self.dtype.itemsize


@dataclass(kw_only=True, slots=True, eq=False)
class Placement:
    """The `count` rows of `pool` from `start` on, which belong to one session. Moves when the store makes room."""

    pool: SlotPool
    start: int
    count: int

    @property
    def num_bytes(self) -> int:
        """What the rows take, used or not."""
        return self.count * self.pool.row_bytes

    def rows(self) -> range:
        """The rows, in order."""
        return range(self.start, self.start + self.count)


class SlotPool:
    """Rows of one capacity for the blocks of one span: by block, keys and values of shape [rows, H, C, D]."""

    def __init__(self, span: Span, shapes: Mapping[int, LayerShape], capacity: int, device: torch.device) -> None:
        self.span, self.capacity, self.device = span, capacity, device
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        for number, shape in shapes.items():
            for tensors, (heads, size) in ((self.keys, shape.key_HD), (self.values, shape.value_HD)):
                tensors[number] = torch.zeros(0, heads, capacity, size, dtype=shape.dtype, device=device)
        self.row_bytes = capacity * sum(shape.num_bytes for shape in shapes.values())
        self.num_rows = 0
        self.placements: list[Placement] = []  # by start

    @property
    def num_bytes(self) -> int:
        """What is allocated."""
        return self.num_rows * self.row_bytes

    @property
    def end(self) -> int:
        """The first row after those in use."""
        return self.placements[-1].start + self.placements[-1].count if self.placements else 0

    def take(self, count: int) -> Placement | None:
        """The first `count` free rows in a line, emptied; None if there are none."""
        start = 0
        for placement in self.placements:
            if placement.start - start >= count:
                break
            start = placement.start + placement.count
        if start + count > self.num_rows:
            return None
        for tensor in self._tensors():
            # What another session left could be infinite, and nothing times infinity is not nothing.
            tensor[start : start + count].zero_()
        taken = Placement(pool=self, start=start, count=count)
        self.adopt(taken)
        return taken

    def adopt(self, placement: Placement) -> None:
        """Know a placement whose rows are here."""
        self.placements = sorted([*self.placements, placement], key=lambda one: one.start)

    def forget(self, placement: Placement) -> None:
        """Let others have its rows."""
        self.placements = [one for one in self.placements if one is not placement]

    def resize(self, num_rows: int) -> None:
        """Allocate so many rows, one tensor after the other; what is in use must fit."""
        for tensors in (self.keys, self.values):
            for number, old in tensors.items():
                tensors[number] = old.new_zeros(num_rows, *old.shape[1:])
                kept = min(num_rows, self.num_rows)
                tensors[number][:kept] = old[:kept]
        self.num_rows = num_rows

    def pack(self) -> None:
        """Close all gaps and give the rest back."""
        start = 0
        for placement in self.placements:
            if placement.start != start:
                for tensor in self._tensors():
                    tensor[start : start + placement.count] = tensor[placement.start :][: placement.count].clone()
                placement.start = start
            start += placement.count
        if self.num_rows != start:
            self.resize(start)

    def reorder(self, placement: Placement, rows: tuple[int, ...], length: int) -> None:
        """Let each row of a placement go on from the first `length` positions of the old row that `rows` names."""
        here = slice(placement.start, placement.start + placement.count)
        for tensor in self._tensors():
            tensor[here, :, :length] = tensor[here, :, :length][list(rows)]

    def _tensors(self) -> tuple[Tensor, ...]:
        return (*self.keys.values(), *self.values.values())


class SlotStore:
    """All pools. Holds no more than `budget_bytes`, as long as its user places no more than fits in exactly."""

    def __init__(self, shapes: Mapping[int, LayerShape], budget_bytes: int, device: torch.device) -> None:
        """`shapes` by block, without the blocks that cache nothing."""
        self._shapes, self._budget_bytes, self._device = dict(shapes), budget_bytes, device
        self._pools: dict[tuple[Span, int], SlotPool] = {}

    @property
    def num_bytes(self) -> int:
        """What is allocated now, spare rows included."""
        return sum(pool.num_bytes for pool in self._pools.values())

    @property
    def windows(self) -> dict[int, int]:
        """The sliding windows, by block."""
        return {number: shape.window for number, shape in self._shapes.items() if shape.window is not None}

    def place(self, span: Span, count: int, capacity: int) -> Placement:
        """`count` empty rows of a capacity that `capacity_for` gave."""
        pool = self._pools.get((span, capacity))
        if pool is None:
            shapes = {number: shape for number, shape in self._shapes.items() if number in span}
            pool = self._pools[span, capacity] = SlotPool(span, shapes, capacity, self._device)
        found = pool.take(count)
        if found is None:
            # Half as much again, so that a hundred sessions do not copy the pool a hundred times.
            rows = pool.end + max(count, pool.num_rows // 2)
            if self.num_bytes + (rows - pool.num_rows) * pool.row_bytes > self._budget_bytes:
                for one in self._pools.values():
                    one.pack()
                rows = pool.end + count
            pool.resize(rows)
            found = pool.take(count)
            assert found is not None
        return found

    def move(self, placement: Placement, capacity: int, length: int) -> None:
        """Take a placement to rows of another capacity with its first `length` positions."""
        old = placement.pool
        new = self.place(old.span, placement.count, capacity)
        # After place(), as that may have moved the old rows.
        for into, came in ((new.pool.keys, old.keys), (new.pool.values, old.values)):
            for number, tensor in came.items():
                rows = tensor[placement.start : placement.start + placement.count]
                into[number][new.start : new.start + new.count, :, :length] = rows[:, :, :length]
        self.release(placement)
        new.pool.forget(new)
        placement.pool, placement.start = new.pool, new.start
        new.pool.adopt(placement)

    def release(self, placement: Placement) -> None:
        """Free the rows; a pool without sessions is given back whole."""
        pool = placement.pool
        pool.forget(placement)
        if not pool.placements:
            self._pools.pop((pool.span, pool.capacity), None)
