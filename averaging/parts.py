"""Which stretch of a class's vector is which reducer's part, and what is computed of it there. No network, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from averaging.codecs import Codec
from averaging.robust import Segment, combine, doubtful

_PARTS_PER_REDUCER = 3  # sending, summing and answering overlap; each message more costs 1.7 ms of CPU
_MIN_PART_BYTES = 2**14
_ROUNDING_BYTES = 64


@dataclass(frozen=True, slots=True)
class Stretch:
    """Values `[start, stop)` of a class's vector."""

    start: int
    stop: int

    @property
    def num_values(self) -> int:
        """How many they are."""
        return self.stop - self.start

    def of(self, vector: torch.Tensor) -> torch.Tensor:
        """A view of these values."""
        return vector[self.start : self.stop]


def stretches(sizes_by_reducer: Sequence[Sequence[int]]) -> tuple[tuple[Stretch, ...], ...]:
    """Where each reducer's parts lie: reducers in order, their parts in order, one after the other."""
    found, offset = [], 0
    for sizes in sizes_by_reducer:
        own = []
        for size in sizes:
            own.append(Stretch(offset, offset + size))
            offset += size
        found.append(tuple(own))
    return tuple(found)


def part_bytes(class_bytes: int, num_reducers: int, max_bytes: int) -> int:
    """How large the parts of a class are: small classes in several parts too, so that the stages overlap.

    A little more than an even part, as what rounding leaves over would be a part, and a message, of a few bytes.
    """
    even = class_bytes // max(1, num_reducers * _PARTS_PER_REDUCER)
    return min(max_bytes, max(_MIN_PART_BYTES, even + _ROUNDING_BYTES))


class Debts:
    """What a lossy codec keeps back in one all-reduce: of what is sent, and of the sums that are made here.

    Error feedback (Seide et al. 2014; Karimireddy et al. 1901.09847), at both ends as in 1905.05957. `vector` is what
    this peer gives, with what it owed; `sent` and `summed` are what will be owed after this, or None if lossless.
    """

    def __init__(
        self, codec: Codec, vector: torch.Tensor, owed_sent: torch.Tensor | None, owed_sum: torch.Tensor | None
    ) -> None:
        self._codec = codec
        for owed in (owed_sent, owed_sum):
            if owed is not None and owed.shape != vector.shape:
                raise ValueError(
                    f"{owed.numel()} values are owed to a vector of {vector.numel()}; start again with None"
                )
        self.vector = vector if owed_sent is None else vector + owed_sent
        self.sent = torch.zeros_like(vector) if codec.is_lossy else None
        self.summed = None
        if codec.is_lossy:
            self.summed = torch.zeros_like(vector) if owed_sum is None else owed_sum.clone()

    def note_sent(self, stretch: Stretch, data: bytes) -> None:
        """`data` is what the others get of this stretch."""
        if self.sent is not None:
            values = stretch.of(self.vector)
            stretch.of(self.sent).copy_(values - self._codec.decode(data, values.numel()))

    def with_owed(self, stretch: Stretch, combined: torch.Tensor) -> torch.Tensor:
        """A sum, with what was kept back of the last one."""
        return combined if self.summed is None else combined + stretch.of(self.summed)

    def note_summed(self, stretch: Stretch, exact: torch.Tensor, decoded: torch.Tensor) -> None:
        """Everybody gets `decoded` for `exact`."""
        if self.summed is not None:
            stretch.of(self.summed).copy_(exact - decoded)


def combine_part(
    rule: str, pieces: Sequence[torch.Tensor | None], segments: Sequence[Segment], stretch: Stretch
) -> torch.Tensor:
    """The combination of one part. Who gave None is left out, and the others count for its share too."""
    dropped = frozenset(index for index, piece in enumerate(pieces) if piece is None)
    own = [
        Segment(
            start=max(segment.start, stretch.start) - stretch.start,
            stop=min(segment.stop, stretch.stop) - stretch.start,
            shares=_without(segment.shares, dropped),
        )
        for segment in segments
        if segment.start < stretch.stop and segment.stop > stretch.start
    ]
    zeros = torch.zeros(stretch.stop - stretch.start)
    return combine(rule, [zeros if piece is None else piece for piece in pieces], own)


def doubted_reducers(
    vector: torch.Tensor, mean: torch.Tensor, stretches_by_reducer: Sequence[Sequence[Stretch]]
) -> frozenset[int]:
    """Reducers, by place, whose answers are out of line with the others' (robust.doubtful)."""
    places = [place for place, own in enumerate(stretches_by_reducer) if own]
    whole = [Stretch(stretches_by_reducer[p][0].start, stretches_by_reducer[p][-1].stop) for p in places]
    doubts = doubtful([part.of(vector) for part in whole], [part.of(mean) for part in whole])
    return frozenset(place for place, doubt in zip(places, doubts, strict=True) if doubt)


def _without(shares: tuple[float, ...], dropped: frozenset[int]) -> tuple[float, ...]:
    if not dropped:
        return shares
    left = [0.0 if index in dropped else share for index, share in enumerate(shares)]
    rest = sum(left)
    return tuple(share * sum(shares) / rest for share in left) if rest > 0 else tuple(left)


class ClassParts:
    """The parts of one class as one of its holders handles them: `me` is its place among the reducers.

    `dropped` are senders, by place, of values that can be no update, in the parts combined here.
    """

    def __init__(
        self,
        rule: str,
        segments: Sequence[Segment],
        debts: Debts,
        by_reducer: Sequence[Sequence[Stretch]],
        *,
        me: int,
    ) -> None:
        self.by_reducer = by_reducer
        self.dropped: set[int] = set()
        self._rule, self._segments, self._debts, self._me = rule, segments, debts, me

    def combine(self, part_index: int, pieces: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """All senders' pieces of one of this holder's parts, and what was kept back of their last sum."""
        self.dropped.update(place for place, piece in enumerate(pieces) if piece is None)
        stretch = self.by_reducer[self._me][part_index]
        return self._debts.with_owed(stretch, combine_part(self._rule, pieces, self._segments, stretch))

    def note_summed(self, part_index: int, exact: torch.Tensor, decoded: torch.Tensor) -> None:
        """Everybody gets `decoded` for what `combine` gave."""
        self._debts.note_summed(self.by_reducer[self._me][part_index], exact, decoded)

    def doubted(self, mean: torch.Tensor) -> frozenset[int]:
        """Reducers, by place, whose answers are out of line; where no robust mean is asked for, nobody is doubted."""
        if self._rule == "none":
            return frozenset()
        return doubted_reducers(self._debts.vector, mean, self.by_reducer) - {self._me}
