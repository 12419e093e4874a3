"""How a host that missed something gets the units' newest state: from holders whose bits differ from its own, and from
keepers, who store what may have no other holder.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from averaging.averager import RoundOutcome
from averaging.config import AveragingConfig
from averaging.rounds import is_plausible, plausible_round, plausible_samples
from blocks.adapters import unit_digest
from blocks.errors import BadAdapter
from blocks.spans import UnitId, parse_unit
from blocks.unit_state import UnitState
from peers.network import PeerId
from peers.records import ProgressRecord
from peers.streams.pool import Pool
from peers.units.client import Fetching, fetch_newest
from swarm.units.book import check_state
from swarm.units.holder import Holder
from swarm.units.own_work import OwnWork

logger = logging.getLogger(__name__)

_STRAY_SECONDS = 3.0  # between two looks at holders who differ: the newer version may be ours, and theirs to fetch
_DISTRUST_SECONDS = 10.0  # before a peer is asked again that was silent, or sent what cannot be right


@dataclass(frozen=True, kw_only=True, slots=True)
class CatchUpConfig:
    """The run's rounds; how long one unit's fetch may take, and how many of those who can be are asked for it."""

    averaging: AveragingConfig
    fetch_seconds: float = 60.0
    max_peers_asked: int = 3
    can_ask: Callable[[Sequence[ProgressRecord]], list[ProgressRecord]] = list


class CatchUp:
    """Brings one host to the newest state that its units' holders have.

    While groups mix (averaging.grouping) holders of one round differ by design, and only newer rounds are fetched.
    """

    def __init__(
        self, host: Holder, pool: Pool, config: CatchUpConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._host, self._pool, self._config, self._clock = host, pool, config, clock
        self.is_mixing = False
        self._own_work = OwnWork(config.averaging.recipe)
        self._stray_check_at = float("-inf")
        self._distrusted: dict[PeerId, float] = {}

    def newest(self, others: Sequence[ProgressRecord]) -> int:
        """The newest completed round that this peer believes in."""
        return plausible_round(self._host.round, [record.round for record in others], self._config.averaging)

    def came_of(self, outcome: RoundOutcome) -> None:
        """A round is over here: what became of this host's work in it."""
        self._own_work.came_of(outcome)

    def is_needed(self, others: Sequence[ProgressRecord]) -> bool:
        """Whether others are at a newer round, or a holder that is not behind has other bits of a held unit.

        The round's number alone does not show it: hosts of other blocks tell of a newer round before a holder of ours
        can be asked, as when a whole swarm starts again, and the units would stay behind until the next round.
        """
        if self.newest(others) > self._host.round:
            return True
        now = self._clock()
        if self.is_mixing or now < self._stray_check_at:
            return False
        digests, others = self._host.digests(), self._config.can_ask(others)
        strayed = any(
            _worth_asking(others, parse_unit(unit)[1], own, digests) for unit, own in self._host.units.items()
        )
        if strayed:
            self._stray_check_at = now + _STRAY_SECONDS
        return strayed

    async def run(
        self, others: Sequence[ProgressRecord], *, is_start: bool = False, stale: Collection[UnitId] = ()
    ) -> frozenset[UnitId]:
        """Fetch the units of which another peer has a newer version, and stand at the newest round seen.

        At the start keepers are asked for versions of the same round, too: a holder that left may have given them what
        it had trained since. Later that would be this host's own past. `stale` units are known from a round to be older
        than others', and fetched though their bits may be the same, as after a round that changed nothing: else this
        host would be left out of each one to come. Returns the units that were replaced.
        """
        found = await self._fetch(others, is_start=is_start, stale=stale)
        # A holder may have gone on since it told its round; who stood before its units' round could not bring them.
        number = max([self._host.round, self.newest(others), *(state.round for state in found.values())])
        if not found and number == self._host.round:
            return frozenset()
        staying, counted = self._own_work.staying(found), self._host.counted()
        try:
            await self._host.adopt(found, number, staying=staying)
        except BadAdapter as error:
            logger.warning("fetched units do not fit and were left: %s", error)
            return frozenset()
        self._own_work.replaced(found, staying)
        lost = max((counted[unit].samples for unit in found if unit not in staying), default=0)
        kept = max((counted[unit].samples for unit in staying), default=0)
        logger.info("caught up round=%d units=%d samples_kept=%d samples_lost=%d", number, len(found), kept, lost)
        return frozenset(found)

    async def _fetch(
        self, others: Sequence[ProgressRecord], *, is_start: bool, stale: Collection[UnitId]
    ) -> dict[UnitId, UnitState]:
        found: dict[UnitId, UnitState] = {}
        now = self._clock()
        self._distrusted = {peer: until for peer, until in self._distrusted.items() if until > now}
        newest = self.newest(others)
        fetching = Fetching(
            digest=unit_digest,
            seconds=self._config.fetch_seconds,
            moments=True,
            check=lambda state: self._check(state, newest, others),
            lost=set(self._distrusted),
        )
        able = self._config.can_ask(others)
        for unit, own in self._host.units.items():
            candidates = [r for r in able if r.round > own.round] if self.is_mixing else able
            block, digests = parse_unit(unit)[1], {} if unit in stale else self._host.digests()
            peers = _worth_asking(candidates, block, own, digests, is_start=is_start)
            left = [peer for peer in peers if peer not in fetching.lost]
            state = await fetch_newest(self._pool, left[: self._config.max_peers_asked], unit, fetching)
            if state is not None and state.version > own.version:
                found[unit] = state
        self._distrusted |= dict.fromkeys(fetching.lost - self._distrusted.keys(), now + _DISTRUST_SECONDS)
        return found

    def _check(self, state: UnitState, newest: int, others: Sequence[ProgressRecord]) -> None:
        """Refuse a state that cannot be; no round would take it, and nothing newer could come in its place.

        Raises:
            BadAdapter: says what is wrong with it.
        """
        if not is_plausible(state.round, state.weight, newest, self._config.averaging):
            raise BadAdapter(
                f"{state.unit} is said to be of round {state.round}, with {state.weight:g} samples behind it; the "
                f"run is at round {newest}"
            )
        check_state(state, self._host.rules.shapes)
        own = self._host.units[state.unit]
        totals = [record.total_samples for record in others]
        most = plausible_samples(state.round, (own.round, own.total_samples), totals, self._config.averaging)
        if state.total_samples > most:  # it is the clock of everybody's learning rate
            raise BadAdapter(
                f"{state.unit} is said to have learnt from {state.total_samples} samples by round {state.round}; at "
                f"most {most} are believed"
            )


def _worth_asking(
    others: Sequence[ProgressRecord],
    block: int,
    own: UnitState,
    digests: Mapping[int, bytes],
    *,
    is_start: bool = False,
) -> list[PeerId]:
    """Who has another state of a block's unit: holders with other bits than ours in `digests` whose round is not older,
    and keepers whose version is of a newer round (at the start: or of the same, with other bits), the furthest first.
    """
    found = []
    for record in others:
        if block in record.span:
            number, digest, least = record.round, record.digest_of(block), own.round
        else:
            kept = record.kept(block)
            if kept is None:
                continue
            (number, digest), least = kept, own.round if is_start else own.round + 1
        # A keeper tells the unit's own round: a newer one may have the same bits, and is the newer state all the same.
        is_newer = block not in record.span and number > own.round
        if number >= least and (is_newer or digest != digests.get(block)):
            found.append((-number, block not in record.span, record.peer))
    return [peer for _, _, peer in sorted(found)]
