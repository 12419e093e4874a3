"""What a host does as a holder: sees that units which too few hold have keepers with their newest state."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from blocks.spans import UnitId, parse_unit
from peers.errors import PeerLost, Refused
from peers.network import PeerId
from peers.records import DIGEST_BYTES, ProgressRecord
from peers.streams.messages import MAX_OFFERS, RefusalCode
from peers.streams.pool import Pool
from peers.units.client import hand_over, offer_of, offer_units
from peers.units.keeping import Copy, Hosts, handovers
from swarm.units.holder import Holder

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
_OFFER_SECONDS = 10.0
_UNIT_SECONDS = 60.0
_AGAIN_SECONDS = 10.0  # after an offer whose outcome no record shows, and after a keeper that did not answer
_FULL_SECONDS = 60.0


class HandingOver:
    """The holder's side of one host. Start `run()` in a task group, or call `tend()`.

    `others` are records of the other hosts that are believed to be there; `clock` counts seconds.
    """

    def __init__(
        self,
        host: Holder,
        pool: Pool,
        others: Callable[[], Sequence[ProgressRecord]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._host, self._pool, self._others, self._clock = host, pool, others, clock
        self._offered: dict[tuple[PeerId, UnitId], tuple[bytes, float]] = {}
        self._declined: dict[tuple[PeerId, UnitId], float] = {}
        self._since: dict[UnitId, tuple[bytes, float]] = {}

    async def run(self) -> None:
        """Hand over whatever is due, until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            await self.tend()

    async def tend(self) -> None:
        """Hand over what is due now; ends when each keeper has it, refuses it or is gone."""
        now = self._clock()
        self._declined = {key: until for key, until in self._declined.items() if until > now}
        held = self._held(now)
        lately = [
            (keeper, unit)
            for (keeper, unit), (digest, at) in self._offered.items()
            if unit in held and digest == held[unit].digest and now - at < _AGAIN_SECONDS
        ]
        self._offered = {key: self._offered[key] for key in lately}
        due = handovers(self._hosts(), held, frozenset(lately))
        async with asyncio.TaskGroup() as tasks:
            for keeper, units in due.items():
                tasks.create_task(self._hand(keeper, units[:MAX_OFFERS]))

    def sole_units(self) -> list[UnitId]:
        """Held units that nobody else holds, as far as records show."""
        spans = [record.span for record in self._others()]
        return [unit for unit in self._host.units if not any(parse_unit(unit)[1] in span for span in spans)]

    def _hosts(self) -> Hosts:
        return Hosts(me=self._pool.me, span=self._host.span, others=self._others(), declined=frozenset(self._declined))

    def _held(self, now: float) -> dict[UnitId, Copy]:
        """The held units in which something was learnt: all others are as the run's seed makes them."""
        found = {}
        for unit, state in self._host.units.items():
            if state.is_untrained:
                continue
            if self._since.get(unit, (b"", 0.0))[0] != state.digest:
                self._since[unit] = (state.digest, now)
            age = now - self._since[unit][1]
            found[unit] = Copy(round=state.round, digest=state.digest[:DIGEST_BYTES], age_seconds=age)
        return found

    async def _hand(self, keeper: PeerId, units: Sequence[UnitId]) -> None:
        offers = {unit: offer_of(self._host.units[unit]) for unit in units}
        try:
            wanted = await offer_units(self._pool, keeper, list(offers.values()), seconds=_OFFER_SECONDS)
            now = self._clock()
            for unit, offer in offers.items():
                self._offered[keeper, unit] = (offer.digest[:DIGEST_BYTES], now)
            self._decline(keeper, wanted.no_room, _FULL_SECONDS)
            for unit in set(wanted.units) & offers.keys():
                await self._hand_one(keeper, unit)
        except PeerLost as error:
            logger.info("units not handed over keeper=%s reason=%s", keeper, error)
            self._decline(keeper, units, _AGAIN_SECONDS)
        except Refused as error:
            logger.info("units not handed over keeper=%s reason=%s", keeper, error)
            self._decline(keeper, units, _LOOK_SECONDS)

    async def _hand_one(self, keeper: PeerId, unit: UnitId) -> None:
        state = await self._host.read_unit(unit, moments=True)
        if state is None:
            return
        try:
            await hand_over(self._pool, keeper, state, seconds=_UNIT_SECONDS)
        except Refused as error:
            logger.info("unit not handed over unit=%s keeper=%s reason=%s", unit, keeper, error)
            self._decline(keeper, [unit], _FULL_SECONDS if error.code == RefusalCode.FULL else _AGAIN_SECONDS)
        else:
            logger.info("unit handed over unit=%s round=%d keeper=%s", unit, state.round, keeper)

    def _decline(self, keeper: PeerId, units: Sequence[UnitId], seconds: float) -> None:
        until = self._clock() + seconds
        for unit in units:
            self._declined[keeper, unit] = until
