"""An exchange among peers of one process in which each combines its part of a class, honestly or not. No network."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from averaging import merge
from averaging.codecs import make_codec
from averaging.exchange import Call, ClassWork, Contribution, Group, Reduced, UnitClass, Vote
from averaging.parts import ClassParts, Debts, Stretch
from averaging.shuffle import Shuffle
from peers.network import PeerId

Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(slots=True)
class Table:
    """Where the peers of one round meet. `sends` and `combines` say what a hostile peer makes of its values."""

    peers: tuple[PeerId, ...]
    robust: str
    max_update: float = 1e3
    sends: Mapping[PeerId, Change] = field(default_factory=dict)
    combines: Mapping[PeerId, Change] = field(default_factory=dict)
    joined: dict[PeerId, Contribution] = field(default_factory=dict)
    given: dict[tuple[bytes, PeerId], torch.Tensor] = field(default_factory=dict)
    means: dict[tuple[bytes, PeerId], torch.Tensor] = field(default_factory=dict)
    votes: dict[tuple[bytes, PeerId], Vote] = field(default_factory=dict)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def all_have(self, book: Mapping[object, object], keys: Sequence[object]) -> None:
        """Wait until every key is in the book."""
        async with self.changed:
            self.changed.notify_all()
            await self.changed.wait_for(lambda: all(key in book for key in keys))


class PartExchange:
    """`averaging.exchange.Exchange` of one peer at a table: the parts are those of averaging.parts."""

    def __init__(self, table: Table, me: PeerId) -> None:
        self._table, self._me = table, me

    async def gather(self, mine: Contribution, call: Call) -> Group | None:
        table = self._table
        table.joined[self._me] = mine
        await table.all_have(table.joined, table.peers)
        names = sorted(table.joined)
        group_id = hashlib.sha256("".join(names).encode()).digest()
        return Group(group_id=group_id, contributions=tuple(table.joined[name] for name in names))

    async def reduce(self, group: Group, work: Sequence[ClassWork]) -> Mapping[bytes, Reduced]:
        results = {}
        for entry in work:
            assert entry.vector is not None
            key = entry.unit_class.class_id
            if self._table.robust == "none":
                results[key] = await self._reduce(entry)
            else:
                shuffle = Shuffle(key, entry.vector.numel())
                results[key] = shuffle.back(await self._reduce(shuffle.there(entry)))
        return results

    async def _reduce(self, work: ClassWork) -> Reduced:
        table, key, holders = self._table, work.unit_class.class_id, work.unit_class.holders
        assert work.vector is not None
        spread = torch.linspace(0, work.vector.numel(), len(holders) + 1).long().tolist()
        stretches = [(Stretch(start, stop),) for start, stop in itertools.pairwise(spread)]
        place = holders.index(self._me)
        debts = Debts(make_codec("fp32"), work.vector, None, None)
        parts = ClassParts(table.robust, work.segments, debts, stretches, me=place)
        table.given[key, self._me] = table.sends.get(self._me, lambda values: values)(work.vector)
        await table.all_have(table.given, [(key, holder) for holder in holders])
        pieces = [stretches[place][0].of(table.given[key, holder]) for holder in holders]
        checked = [piece if self._is_update(piece) else None for piece in pieces]
        table.means[key, self._me] = table.combines.get(self._me, lambda values: values)(parts.combine(0, checked))
        await table.all_have(table.means, [(key, holder) for holder in holders])
        mean = torch.cat([table.means[key, holder] for holder in holders])
        return Reduced(
            mean=mean,
            digest=merge.digest([mean]),
            dropped=frozenset(holders[index] for index in parts.dropped),
            doubted=frozenset(holders[index] for index in parts.doubted(mean)),
        )

    def _is_update(self, piece: torch.Tensor) -> bool:
        return merge.is_finite(piece) and float(piece.abs().max()) <= self._table.max_update

    async def vote(
        self, group: Group, classes: Sequence[UnitClass], votes: Mapping[bytes, Vote], *, deadline: float
    ) -> Mapping[bytes, Mapping[PeerId, Vote]]:
        table = self._table
        table.votes.update({(key, self._me): vote for key, vote in votes.items()})
        heard = {}
        for entry in classes:
            await table.all_have(table.votes, [(entry.class_id, holder) for holder in entry.holders])
            heard[entry.class_id] = {holder: table.votes[entry.class_id, holder] for holder in entry.holders}
        return heard
