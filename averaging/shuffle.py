"""An order of a class's values that no peer chose, so that each reducer's part is a fair sample of all of them. Pure.

Robust means judge peers by lengths and angles of single parts, and reducers by their parts against the others'. In the
units' own order that is unfair: the factors A and B, or early and late blocks, are unlike.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from averaging.exchange import ClassWork, Reduced
from averaging.robust import Segment

_SMALL_PRIMES = 2 * 3 * 5 * 7


class Shuffle:
    """The order of one class: place i holds value `(a i + b) mod n`, with a and b from the class's id.

    a has no divisor in common with n, nor any small one, so that no regular pattern of the tensors falls into one part.
    Whole numbers alone, so that every machine agrees.
    """

    def __init__(self, class_id: bytes, num_values: int) -> None:
        step = int.from_bytes(class_id[:4], "big") % num_values | 1
        while math.gcd(step, num_values * _SMALL_PRIMES) != 1:
            step += 2
        begin = int.from_bytes(class_id[4:8], "big") % num_values
        self._order = (torch.arange(num_values) * step + begin) % num_values

    def there(self, work: ClassWork) -> ClassWork:
        """The class's work in the new order; all its units count the same (see planning.py), so one segment does."""
        segment = Segment(start=0, stop=len(self._order), shares=work.segments[0].shares)
        return replace(
            work,
            vector=self._there(work.vector),
            owed_sent=self._there(work.owed_sent),
            owed_sum=self._there(work.owed_sum),
            segments=(segment,),
        )

    def back(self, reduced: Reduced) -> Reduced:
        """What came of it, in the units' own order."""
        return replace(
            reduced,
            mean=self._back(reduced.mean),
            owed_sent=self._back(reduced.owed_sent),
            owed_sum=self._back(reduced.owed_sum),
        )

    def _there(self, vector: torch.Tensor | None) -> torch.Tensor | None:
        return None if vector is None else vector[self._order]

    def _back(self, vector: torch.Tensor | None) -> torch.Tensor | None:
        if vector is None:
            return None
        result = torch.empty_like(vector)
        result[self._order] = vector
        return result
