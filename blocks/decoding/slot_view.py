"""What the attention layers of one pass see as their cache: the rows of several sessions, each at its own position.

The family's own mask functions stay in charge. transformers asks a cache for one query offset and adds it to the
indices of the queries (`Cache.get_query_offset`, `masking_utils.sdpa_mask`); where rows differ, this one answers with
an object that, added to indices, becomes the positions of each row. So sliding windows and chunks come out right for
every row, and nothing of the library is replaced or registered. Alibi and padding go by the two-dimensional mask.

B: rows of the pass, H: heads, T: new tokens, K: positions that are read, D: size of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DummyLayer

from blocks.decoding.slots import Placement


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """One session's rows in a pass: where they are, the position of their first new token, how many are new."""

    placement: Placement
    position: int
    tokens: int

    @property
    def end(self) -> int:
        """The session's length after the pass."""
        return self.position + self.tokens


class RowPositions:
    """Stands for the query offset of a pass whose rows are at different positions."""

    def __init__(self, positions_BT: Tensor) -> None:
        self._positions_BT = positions_BT

    def __radd__(self, indices_T: Tensor) -> RowPositions:
        """The positions of the queries with these indices, in every row."""
        return self

    def __getitem__(self, index: object) -> Tensor:
        """Shaped as mask functions want them, [B, 1, T, 1]; the library asks with (None, None, slice, None)."""
        return self._positions_BT[:, None, :, None]


class SlotView(Cache):  # type: ignore[misc]
    """The cache of one pass. New keys and values are written behind each session's length, which counts later.

    A pass that fails therefore changes nothing, and can be done again.
    """

    def __init__(self, num_layers: int, rows: Sequence[Rows], windows: Mapping[int, int]) -> None:
        """`rows` in the order of the pass. Rows that lie in one pool in a line are read in place, others are copied."""
        super().__init__(layers=[DummyLayer() for _ in range(num_layers)])
        self._rows, self._windows = list(rows), windows
        self.length = max(one.end for one in rows)
        self.tokens = max(one.tokens for one in rows)
        first = rows[0]
        self._span = first.placement.pool.span
        self._one_pool = all(one.placement.pool is first.placement.pool for one in rows)
        self.uniform = all((one.position, one.tokens) == (first.position, first.tokens) for one in rows)
        if not self.uniform and self.tokens == self.length:
            # As many queries as positions and nothing masked is what transformers takes for a plain causal prompt, also
            # where the queries of some rows start later; one more padding token makes it look.
            self.tokens += 1
        indices = [row for one in rows for row in one.placement.rows()]
        self._in_line = self._one_pool and indices == list(range(indices[0], indices[0] + len(indices)))
        self._start, self._count = indices[0], len(indices)
        device = first.placement.pool.device
        if not self.uniform:
            self.positions_BT = _positions(rows, self.tokens).to(device)
        if not (self.uniform and self._in_line):
            self._rows_B = torch.tensor(indices, device=device)

    @property
    def is_sliding(self) -> list[bool]:
        """By layer, whether its attention slides."""
        return [number in self._windows and number in self._span for number in range(len(self.layers))]

    @property
    def is_linear(self) -> list[bool]:
        """By layer, whether it is recurrent; such layers do not come here."""
        return [False] * len(self.layers)

    @property
    def is_dummy(self) -> list[bool]:
        """By layer, whether it is not computed in this pass."""
        return [number not in self._span for number in range(len(self.layers))]

    @property
    def is_compileable(self) -> bool:
        """Whether shapes stay the same from pass to pass; they do not."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many positions lie before the new tokens of the longest row."""
        return max(0, self.length - self.tokens)

    def get_query_offset(self, layer_idx: int = 0) -> int | RowPositions:
        """The position of the first new token, or of all new tokens where rows differ."""
        return self._rows[0].position if self.uniform else RowPositions(self.positions_BT)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """How many positions a layer reads, and which is the first."""
        first = self._first(layer_idx)
        return self.length - first, first

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the new keys and values [B, H, T, D] of a layer, and read all of its rows -> twice [B, H, K, D]."""
        for name, states_BHTD in (("keys", key_states), ("values", value_states)):
            self._write(name, layer_idx, states_BHTD)
        return self._read("keys", layer_idx), self._read("values", layer_idx)

    def _first(self, layer_idx: int) -> int:
        window = self._windows.get(layer_idx)
        return 0 if window is None else max(0, min(one.position for one in self._rows) - window + 1)

    def _write(self, name: str, layer_idx: int, states_BHTD: Tensor) -> None:
        if self._one_pool and self.tokens == 1 and not self.uniform:
            stored = _stored(self._rows[0], name, layer_idx)
            stored[self._rows_B, :, self.positions_BT[:, 0]] = states_BHTD[:, :, 0]
            return
        if self._in_line and self.uniform:
            stored, one = _stored(self._rows[0], name, layer_idx), self._rows[0]
            stored[self._start : self._start + self._count, :, one.position : one.end] = states_BHTD
            return
        offset = 0
        for one in self._rows:
            rows = slice(one.placement.start, one.placement.start + one.placement.count)
            new = states_BHTD[offset : offset + one.placement.count, :, : one.tokens]
            _stored(one, name, layer_idx)[rows, :, one.position : one.end] = new
            offset += one.placement.count

    def _read(self, name: str, layer_idx: int) -> Tensor:
        first = self._first(layer_idx)
        stored = _stored(self._rows[0], name, layer_idx)
        if self._in_line:
            return stored[self._start : self._start + self._count, :, first : self.length]
        if self._one_pool:
            return stored[:, :, first : self.length].index_select(0, self._rows_B)
        gathered = stored.new_zeros(self._count, stored.shape[1], self.length - first, stored.shape[3])
        offset = 0
        for one in self._rows:
            rows = slice(one.placement.start, one.placement.start + one.placement.count)
            seen = _stored(one, name, layer_idx)[rows, :, first : one.end]
            gathered[offset : offset + one.placement.count, :, : seen.shape[2]] = seen
            offset += one.placement.count
        return gathered


def _stored(one: Rows, name: str, layer_idx: int) -> Tensor:
    pool = one.placement.pool
    return pool.keys[layer_idx] if name == "keys" else pool.values[layer_idx]


def _positions(rows: Sequence[Rows], tokens: int) -> Tensor:
    """Of each new token of each row [B, T]; padding repeats the last one, so that it always has something to attend."""
    steps_1T = torch.arange(tokens)[None]
    starts_B1 = torch.tensor([one.position for one in rows for _ in one.placement.rows()])[:, None]
    ends_B1 = torch.tensor([one.end for one in rows for _ in one.placement.rows()])[:, None]
    return torch.minimum(starts_B1 + steps_1T, ends_B1 - 1)
