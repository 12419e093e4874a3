"""The other hosts of a run, as one host knows them: read from the directory, without those who are gone or banned."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from averaging.averager import RoundOutcome
from averaging.bans import Bans, Misses
from blocks.spans import Span
from peers.directory import Directory
from peers.network import PeerId
from peers.records import ProgressRecord
from peers.routes.router import LiveRouter
from peers.streams.pool import Pool

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """What a host knows of the others: where they are found, how they are asked, and the clock that all agree on; and
    whether it is behind NAT itself, so that it reaches none of those who are.
    """

    directory: Directory
    pool: Pool
    dht_time: Callable[[], float]
    router: LiveRouter
    behind_nat: bool = False

    def reachable(self, records: Sequence[ProgressRecord]) -> list[ProgressRecord]:
        """Those of `records` that this peer can call. One behind NAT keeps a connection to who is not (reaching.py)."""
        return [record for record in records if not (self.behind_nat and record.behind_nat)]


class Company:
    """Who else hosts blocks of `run`, as of the last `look`."""

    def __init__(self, around: Surroundings, run: str, whole: Span) -> None:
        self._around, self._run, self._whole = around, run, whole
        self._records: Sequence[ProgressRecord] = ()
        self._bans, self._misses = Bans(around.dht_time), Misses()

    async def look(self) -> list[ProgressRecord]:
        """Read the directory; returns `others`."""
        self._records = await self._around.directory.find_progress(self._run, self._whole)
        return self.others()

    def others(self) -> list[ProgressRecord]:
        """Who is not away and not banned, and of whom no call has failed lately."""
        return self.usable(self._records)

    def known(self) -> list[ProgressRecord]:
        """All of them, also those that leave or did not answer."""
        return [record for record in self._records if record.peer != self._around.pool.me]

    def usable(self, records: Sequence[ProgressRecord]) -> list[ProgressRecord]:
        """Those of `records` that `others` would have."""
        health, out = self._around.router.health, self._bans.banned() | {self._around.pool.me}
        return [
            record for record in records if not record.away and health.is_usable(record.peer) and record.peer not in out
        ]

    async def check(self, span: Span) -> None:
        """Ask the holders of a block of `span` whether they are there; who is not is left out of `others`."""
        holders = [each for each in self.others() if each.span.start < span.end and span.start < each.span.end]
        await self.ask(holders)

    async def ask(self, records: Sequence[ProgressRecord]) -> None:
        """Ask them whether they are there; who does not answer is left out of `others`. Who cannot be asked stays."""
        await self._around.router.check([record.peer for record in self._around.reachable(records)])

    def banned(self) -> frozenset[PeerId]:
        """Whom this peer does not average with now."""
        return self._bans.banned()

    def judge(self, outcome: RoundOutcome) -> None:
        """Ban whom most holders accuse after a round, and who has kept the others from theirs; for longer each time."""
        spoilers = self._misses.saw(outcome.peers, outcome.missing | outcome.spoilers) - outcome.offenders
        for peers, why in (
            (outcome.offenders, "most holders had values from it that cannot be right"),
            (spoilers, "several rounds in a row failed because of it"),
        ):
            for peer, ban in self._bans.strike(peers - {self._around.pool.me}).items():
                logger.warning("round %d: peer %s is banned for %.0f s: %s", outcome.number, peer, ban.seconds, why)
