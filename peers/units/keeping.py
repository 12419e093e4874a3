"""Who keeps copies of units that too few peers hold, and who hands them over. Pure: no clock, no network.

A keeper is a live host that stores a unit's state without training it, so that it outlives its holders. All peers
that see the same records name the same keepers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from blocks.spans import Span, UnitId, parse_unit
from peers.network import PeerId
from peers.records import DIGEST_BYTES, MAX_KEEPINGS, Keeping, ProgressRecord

ENOUGH_COPIES = 3
PATIENCE_SECONDS = 10.0  # how long each holder waits for the one before it to hand a unit over
_TOLD_BLOCKS = 128  # of kept units in a record, less where its own digests fill it: a record stays under 4 kB
_RECORD_BLOCKS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """A version of a unit as records name it, and for how many seconds whoever says so has had it."""

    round: int
    digest: bytes
    age_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Hosts:
    """The live hosts as one of them sees them. `others` are records of those whom it believes to be there; `declined`
    says which keeper does not take which unit for now.
    """

    me: PeerId
    span: Span
    others: Sequence[ProgressRecord]
    declined: Collection[tuple[PeerId, UnitId]] = ()

    def holders(self, block: int) -> frozenset[PeerId]:
        """Who trains the block and can hand its unit to whoever asks, which nobody behind NAT can; and `me`."""
        found = {record.peer for record in self.others if block in record.span and not record.behind_nat}
        return frozenset(found | {self.me} if block in self.span else found)

    def keepers(self, unit: UnitId) -> tuple[PeerId, ...]:
        """Who should keep the unit: enough that three have it."""
        willing = {
            record.peer for record in self.others if (record.peer, unit) not in self.declined and not record.behind_nat
        }
        return keepers_of(unit, self.holders(parse_unit(unit)[1]), willing | {self.me})


def keepers_of(unit: UnitId, holders: Collection[PeerId], hosts: Collection[PeerId]) -> tuple[PeerId, ...]:
    """Which hosts keep a unit: those whose hash with it is highest, so that few change when peers come and go."""
    lacking = ENOUGH_COPIES - len(holders)
    if lacking <= 0:
        return ()
    able = sorted(set(hosts) - set(holders), key=lambda peer: _score(unit, peer), reverse=True)
    return tuple(able[:lacking])


def handovers(
    hosts: Hosts, held: Mapping[UnitId, Copy], offered: Collection[tuple[PeerId, UnitId]]
) -> dict[PeerId, list[UnitId]]:
    """Which of the units that `hosts.me` holds it should offer to whom now.

    The first of a unit's holders does it, each other one if it has not happened in its time. `offered` are those that
    were offered lately, and may have been taken without a record that says so yet.
    """
    found: dict[PeerId, list[UnitId]] = {}
    records = {record.peer: record for record in hosts.others}
    for unit, copy in held.items():
        block = parse_unit(unit)[1]
        turn = sorted(hosts.holders(block)).index(hosts.me)
        if copy.age_seconds < turn * PATIENCE_SECONDS:
            continue
        for keeper in hosts.keepers(unit):
            if (keeper, unit) not in offered and not _has(records[keeper], block, copy):
                found.setdefault(keeper, []).append(unit)
    return found


def is_spare(hosts: Hosts, unit: UnitId, copy: Copy) -> bool:
    """Whether a unit that `hosts.me` keeps is safe without it: three hold it, or some do and others keep it as new."""
    block = parse_unit(unit)[1]
    holders = hosts.holders(block)
    if len(holders) >= ENOUGH_COPIES:
        return True
    keepers = hosts.keepers(unit)
    records = {record.peer: record for record in hosts.others}
    return bool(holders and keepers) and all(peer != hosts.me and _has(records[peer], block, copy) for peer in keepers)


def is_elsewhere(hosts: Hosts, unit: UnitId, copy: Copy) -> bool:
    """Whether others have a unit that `hosts.me` keeps, as new as here: a holder, or a keeper whom the unit's hash puts
    before `hosts.me`, as of two that see each other one has to stay.
    """
    block, mine = parse_unit(unit)[1], _score(unit, hosts.me)
    for record in hosts.others:
        if record.behind_nat:
            continue
        if block in record.span and record.digest_of(block) == copy.digest[:DIGEST_BYTES]:
            return True
        if _score(unit, record.peer) > mine and _has(record, block, copy):
            return True
    return False


def told(kept: Mapping[UnitId, Copy], span: Span) -> tuple[Keeping, ...]:
    """What a record of a host of `span` says of the units that it keeps, the newest first if they do not all fit."""
    room = max(0, min(_TOLD_BLOCKS, _RECORD_BLOCKS - len(span)))
    copies = {parse_unit(unit)[1]: copy for unit, copy in kept.items()}
    newest = sorted(copies, key=lambda block: (-copies[block].round, block))[:room]
    runs: list[Keeping] = []
    for block in sorted(newest):
        copy = copies[block]
        last = runs[-1] if runs else None
        if last is not None and last.span.end == block and last.round == copy.round:
            runs[-1] = Keeping(Span(last.span.start, block + 1), last.round, last.digests + copy.digest[:DIGEST_BYTES])
        else:
            runs.append(Keeping(Span(block, block + 1), copy.round, copy.digest[:DIGEST_BYTES]))
    return tuple(sorted(runs, key=lambda run: -run.round)[:MAX_KEEPINGS])


def keepers_with(records: Iterable[ProgressRecord], block: int) -> list[PeerId]:
    """Who says that it keeps the block's unit, the newest first."""
    found = []
    for record in records:
        kept = record.kept(block)
        if kept is not None:
            found.append((-kept[0], record.peer))
    return [peer for _, peer in sorted(found)]


def _has(record: ProgressRecord, block: int, copy: Copy) -> bool:
    kept = record.kept(block)
    return kept is not None and (kept[0] > copy.round or kept == (copy.round, copy.digest[:DIGEST_BYTES]))


def _score(unit: UnitId, peer: PeerId) -> bytes:
    return hashlib.sha256(f"{unit} {peer}".encode()).digest()
