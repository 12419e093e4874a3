"""What a host does as a keeper: takes units that others hold, if they can be right and there is room."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from averaging.config import AveragingConfig
from averaging.rounds import is_plausible, plausible_samples
from blocks.spans import Span, UnitId, parse_unit
from blocks.unit_state import UnitState, joined
from peers.errors import Refused
from peers.network import PeerId
from peers.records import ProgressRecord
from peers.streams.messages import RefusalCode, Wanted
from peers.streams.values import Offer
from peers.units.client import num_bytes_of
from peers.units.keeping import Copy, Hosts, is_elsewhere, is_spare
from swarm.errors import BadCheckpoint
from swarm.reports.traffic import size_words
from swarm.units.book import check_state
from swarm.units.holder import Holder
from swarm.units.kept import KeptUnit

logger = logging.getLogger(__name__)

_MAX_PARTS = 8  # a unit's tensors, AdamW's two moments, Adam's two outer ones, controls and a basis
_FILE_BYTES = 1 << 16  # what a file takes besides tensors, and small ones
_LOOK_SECONDS = 10.0


class Safekeeping:
    """The keeper's side of one host; implements peers.units.service.UnitKeeper.

    `others` are records of the other hosts that are believed to be there, `known` also of those that leave. A version
    that no round can have made is refused: nothing newer could take its place.
    """

    def __init__(
        self,
        host: Holder,
        me: PeerId,
        others: Callable[[], Sequence[ProgressRecord]],
        *,
        known: Callable[[], Sequence[ProgressRecord]],
        averaging: AveragingConfig,
    ) -> None:
        self._host, self._me, self._others, self._known = host, me, others, known
        self._averaging = averaging
        self._said_over = 0

    async def run(self) -> None:
        """Keep to the limit, which may have been lowered since the last start, or passed by what a host that came back
        with another span had held; until cancelled.
        """
        while True:
            self.keep_to_limit()
            await asyncio.sleep(_LOOK_SECONDS)

    def keep_to_limit(self) -> None:
        """While more is kept than the limit allows, drop what others have as new, the oldest first."""
        kept = self._host.kept
        over = -kept.free_bytes
        if over <= 0:
            self._said_over = 0
            return
        before = len(kept.units)
        self._make_room(0)
        hosts = Hosts(me=self._me, span=self._host.span, others=self._others())
        for unit, there in _oldest_first(kept.units):
            if kept.free_bytes >= 0:
                break
            if is_elsewhere(hosts, unit, Copy(round=there.version[0], digest=there.version[2])):
                kept.drop(unit)
        if before > len(kept.units) or over != self._said_over:
            logger.warning(
                "%s more than --keep-mb allows was kept of others' units: %d that others have were dropped, %s over it "
                "stay, of which nobody else is known to have a copy",
                size_words(over), before - len(kept.units), size_words(max(0, -kept.free_bytes)),
            )  # fmt: skip
        self._said_over = max(0, -kept.free_bytes)

    def look_at(self, peer: PeerId, offers: Sequence[Offer]) -> Wanted:
        """See UnitKeeper."""
        kept = self._host.kept
        wanted: list[UnitId] = []
        no_room: list[UnitId] = []
        promised = 0
        held = [record.span for record in self._known() if record.peer == peer]
        for offer in offers:
            self._check(peer, held, offer)
            if offer.unit in self._host.units or not kept.is_newer(offer.unit, offer.version):
                continue
            old = kept.units.get(offer.unit)
            needed = promised + max(0, offer.num_bytes + _FILE_BYTES - (0 if old is None else old.num_bytes))
            if needed > kept.free_bytes:
                self._make_room(needed, but=offer.unit)
            if needed > kept.free_bytes:
                no_room.append(offer.unit)
                continue
            promised = needed
            wanted.append(offer.unit)
        return Wanted(units=tuple(wanted), no_room=tuple(no_room))

    async def keep(self, peer: PeerId, state: UnitState) -> None:
        """See UnitKeeper."""
        num_bytes = num_bytes_of(joined(state))
        answer = self.look_at(peer, [Offer(state.unit, state.round, state.weight, state.digest, num_bytes)])
        if answer.no_room:
            raise Refused(f"there is no room here to keep {state.unit}", RefusalCode.FULL)
        if not answer.units:
            return
        self._check_samples(state)
        await asyncio.to_thread(check_state, state, self._host.rules.shapes)
        try:
            await asyncio.to_thread(self._host.kept.put, state)
        except BadCheckpoint as error:
            logger.error("%s", error)
            raise Refused(f"{state.unit} cannot be written here", RefusalCode.FULL) from error
        logger.info("unit kept for others unit=%s round=%d from=%s", state.unit, state.round, peer)

    async def read_unit(self, unit: UnitId, *, moments: bool) -> UnitState | None:
        """See UnitSource."""
        if unit not in self._host.kept.units:
            return None
        state = await asyncio.to_thread(self._host.kept.get, unit)
        return state if state is None or moments else replace(state, moments={})

    def _check(self, peer: PeerId, held: Sequence[Span], offer: Offer) -> None:
        """Refuse what a peer whose record says that it holds `held` may not have kept here."""
        unit, shapes = offer.unit, self._host.rules.shapes
        if unit not in shapes:
            raise Refused(f"unit {unit} is not one of this run's", RefusalCode.MALFORMED)
        block = parse_unit(unit)[1]
        if not any(block in span for span in held):
            raise Refused(f"no record says here that peer {peer} holds block {block}; offer it again", RefusalCode.BUSY)
        if not is_plausible(offer.round, offer.weight, self._host.round, self._averaging):
            reason = (
                f"round {offer.round} of {unit} with {offer.weight:g} samples is not believed at {self._host.round}"
            )
            raise Refused(reason, RefusalCode.MALFORMED)
        own_bytes = sum(4 * math.prod(shape) for shape in shapes[unit].values())
        if offer.num_bytes > _MAX_PARTS * own_bytes + _FILE_BYTES:
            raise Refused(f"{offer.num_bytes} bytes are too many for {unit}", RefusalCode.MALFORMED)

    def _check_samples(self, state: UnitState) -> None:
        """Refuse a unit that would put an end to the schedule of whoever takes it from here."""
        own = self._host.round, self._host.total_samples()
        totals = [record.total_samples for record in self._known()]
        most = plausible_samples(state.round, own, totals, self._averaging)
        if state.total_samples > most:
            reason = (
                f"{state.total_samples} samples by round {state.round} of {state.unit} are not believed, at most {most}"
            )
            raise Refused(reason, RefusalCode.MALFORMED)

    def _make_room(self, needed: int, *, but: UnitId | None = None) -> None:
        """Drop what is safe without this keeper, the oldest first, until `needed` bytes are free."""
        kept = self._host.kept
        hosts = Hosts(me=self._me, span=self._host.span, others=self._others())
        for unit, there in _oldest_first(kept.units):
            if needed <= kept.free_bytes:
                return
            if unit != but and is_spare(hosts, unit, Copy(round=there.version[0], digest=there.version[2])):
                kept.drop(unit)
                logger.info("unit kept no longer, others have it unit=%s", unit)


def _oldest_first(units: Mapping[UnitId, KeptUnit]) -> list[tuple[UnitId, KeptUnit]]:
    return sorted(units.items(), key=lambda item: item[1].version)
