"""What lossy codecs still owe, by unit and tensor: it is added in the next round (error feedback). No network."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch

from averaging import merge
from averaging.merge import UnitTensors
from blocks.spans import UnitId

Owed = dict[UnitId, dict[str, torch.Tensor]]


class Feedback:
    """One peer's debts: of what it sent (`sent`) and of the sums that it made for others (`summed`)."""

    def __init__(self) -> None:
        self._sent: Owed = {}
        self._summed: Owed = {}
        self._before: dict[UnitId, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = {}

    def owed(
        self, units: Sequence[UnitId], like: Mapping[UnitId, UnitTensors]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Both debts as vectors like `merge.flatten(units, like)`; None where nothing is owed."""
        return _vector(self._sent, units, like), _vector(self._summed, units, like)

    def settle(
        self,
        units: Sequence[UnitId],
        like: Mapping[UnitId, UnitTensors],
        sent: torch.Tensor | None,
        summed: torch.Tensor | None,
        *,
        unheard: Collection[UnitId] = (),
    ) -> None:
        """A round that applied leaves these debts. One that did not leaves the old ones, so nobody calls this.

        What this peer gave of `unheard` units counted for nothing: what it owed for them it owes still.
        """
        for unit in units:
            self._before[unit] = dict(self._sent.get(unit, {})), dict(self._summed.get(unit, {}))
        for book, vector, left in ((self._sent, sent, unheard), (self._summed, summed, ())):
            if vector is not None:
                for unit, tensors in merge.unflatten(vector, units, like).items():
                    if unit not in left:
                        book.setdefault(unit, {}).update({name: tensor.clone() for name, tensor in tensors.items()})

    def begin(self) -> None:
        """What is settled from now on belongs to another round than what was before."""
        self._before.clear()

    def withdraw(self, units: Iterable[UnitId]) -> None:
        """What was settled of these units since `begin` was not applied after all: the older debts stand."""
        for unit in self._before.keys() & set(units):
            for book, debts in zip((self._sent, self._summed), self._before.pop(unit), strict=True):
                book.pop(unit, None)
                if debts:
                    book[unit] = debts

    def forget(self, units: Sequence[UnitId]) -> None:
        """These units were replaced by another holder's state: what was owed to the old one means nothing any more."""
        for unit in units:
            for book in (self._sent, self._summed, self._before):
                book.pop(unit, None)


def _vector(book: Owed, units: Sequence[UnitId], like: Mapping[UnitId, UnitTensors]) -> torch.Tensor | None:
    if not any(unit in book for unit in units):
        return None
    pieces = []
    for unit in units:
        known = book.get(unit, {})
        for name, tensor in sorted(like[unit].items()):
            owed = known.get(name)
            fits = owed is not None and owed.shape == tensor.shape
            pieces.append(owed.reshape(-1) if fits and owed is not None else torch.zeros(tensor.numel()))
    return torch.cat(pieces)
