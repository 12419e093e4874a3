"""How a host that missed something gets the units' newest state: from holders whose bits differ from its own."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from averaging.config import AveragingConfig
from averaging.rounds import plausible_round
from blocks.adapters import unit_digest
from blocks.errors import BadAdapter
from blocks.spans import Span, UnitId, parse_unit
from blocks.unit_state import UnitState
from peers.directory import Directory
from peers.network import PeerId
from peers.pool import Pool
from peers.records import ProgressRecord
from peers.unit_client import fetch_newest
from swarm.host import Host

logger = logging.getLogger(__name__)

_STRAY_SECONDS = 3.0  # between two looks at holders who differ: the newer version may be ours, and theirs to fetch


@dataclass(frozen=True, kw_only=True, slots=True)
class CatchUpConfig:
    """The run's blocks; how long one unit's fetch may take, and how many holders are asked for it."""

    whole: Span
    averaging: AveragingConfig
    fetch_seconds: float = 60.0
    max_holders_asked: int = 3


class CatchUp:
    """Brings one host to the newest state that its units' holders have.

    While groups mix (averaging.grouping) holders of one round differ by design, and only newer rounds are fetched.
    """

    def __init__(self, host: Host, directory: Directory, pool: Pool, config: CatchUpConfig) -> None:
        self._host, self._directory, self._pool, self._config = host, directory, pool, config
        self.is_mixing = False
        self._stray_check_at = float("-inf")

    def newest(self, others: Sequence[ProgressRecord]) -> int:
        """The newest completed round that this peer believes in."""
        return plausible_round(self._host.round, [record.round for record in others], self._config.averaging)

    def is_needed(self, others: Sequence[ProgressRecord], now: float) -> bool:
        """Whether others are at a newer round, or a holder that is not behind has other bits of a held unit.

        The round's number alone does not show it: hosts of other blocks tell of a newer round before a holder of ours
        can be asked, as when a whole swarm starts again, and the units would stay behind until the next round.
        """
        if self.newest(others) > self._host.round:
            return True
        if self.is_mixing or now < self._stray_check_at:
            return False
        digests = self._host.digests()
        strayed = any(
            _worth_asking(others, parse_unit(unit)[1], own, digests) for unit, own in self._host.units.items()
        )
        if strayed:
            self._stray_check_at = now + _STRAY_SECONDS
        return strayed

    async def run(self, others: Sequence[ProgressRecord] | None = None) -> frozenset[UnitId]:
        """Fetch the units of which another holder has a newer version, and stand at the newest round seen.

        Returns the units that were replaced.
        """
        if others is None:
            records = await self._directory.find_progress(self._host.rules.run, self._config.whole)
            others = [record for record in records if record.peer != self._pool.me]
        found = await self._fetch(self._host.units, others)
        number = max(self._host.round, self.newest(others))
        if not found and number == self._host.round:
            return frozenset()
        try:
            await self._host.adopt(found, number)
        except BadAdapter as error:
            logger.warning("fetched units do not fit and were left: %s", error)
            return frozenset()
        logger.info("caught up round=%d units=%d", number, len(found))
        return frozenset(found)

    async def _fetch(self, units: Iterable[UnitId], others: Sequence[ProgressRecord]) -> dict[UnitId, UnitState]:
        found: dict[UnitId, UnitState] = {}
        for unit in units:
            own = self._host.units[unit]
            candidates = [r for r in others if r.round > own.round] if self.is_mixing else others
            holders = _worth_asking(candidates, parse_unit(unit)[1], own, self._host.digests())
            state = await fetch_newest(
                self._pool,
                holders[: self._config.max_holders_asked],
                unit,
                moments=True,
                digest=unit_digest,
                seconds=self._config.fetch_seconds,
            )
            if state is not None and state.version > own.version:
                found[unit] = state
        return found


def _worth_asking(
    others: Sequence[ProgressRecord], block: int, own: UnitState, digests: Mapping[int, bytes]
) -> list[PeerId]:
    """Holders of a block whose bits differ from ours and whose round is not older, the furthest first."""
    holders = [
        record
        for record in others
        if block in record.span and record.round >= own.round and record.digest_of(block) != digests[block]
    ]
    return [record.peer for record in sorted(holders, key=lambda record: (-record.round, record.peer))]
