"""When this peer averages: publishes progress, sees that enough samples are in, runs the round, applies it, catches up.

The rules are in `averaging.rounds`; this is the one place where they meet a host, a directory and a clock.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

from averaging.averager import Averager, Link, RoundOutcome
from averaging.config import AveragingConfig
from averaging.errors import RoundFailed
from averaging.rounds import PeerProgress, agreed_start, has_quorum, plausible_round, should_begin
from blocks.adapters import UnitTensors, unit_digest
from blocks.errors import BadAdapter
from blocks.spans import Span, UnitId, parse_unit
from blocks.unit_state import UnitState
from peers.directory import Directory
from peers.network import PeerId
from peers.pool import Pool
from peers.records import ProgressRecord
from peers.router import LiveRouter
from peers.unit_client import fetch_newest
from swarm.errors import BadCheckpoint
from swarm.host import Host, RoundResult
from swarm.progress import ProgressTeller, progress_of

logger = logging.getLogger(__name__)

_STRAY_SECONDS = 3.0  # between two looks at holders who differ: the newer version may be ours, and theirs to fetch


@dataclass(frozen=True, kw_only=True, slots=True)
class KeeperConfig:
    """The run's blocks and its rounds; how often the swarm's progress is read, how long one unit's fetch may take."""

    whole: Span
    averaging: AveragingConfig
    link: Link | None = None
    poll_seconds: float = 0.5
    fetch_seconds: float = 60.0
    max_holders_asked: int = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """What a host knows of the others: where they are found, how they are asked, and the clock that all agree on."""

    directory: Directory
    pool: Pool
    dht_time: Callable[[], float]
    router: LiveRouter


class RoundKeeper:
    """Keeps one host in step with its run. Start `run()` in a task group."""

    def __init__(self, host: Host, averager: Averager, around: Surroundings, config: KeeperConfig) -> None:
        self.last: RoundOutcome | None = None
        self.rounds_done = 0
        self._stray_check_at = float("-inf")
        self._host, self._averager, self._around, self._config = host, averager, around, config
        self._progress = ProgressTeller(host, around.pool.me, around.directory, around.dht_time)

    @property
    def number(self) -> int:
        """The round that is to come."""
        return self._host.round + 1

    async def run(self) -> None:
        """Follow the run, until cancelled."""
        while True:
            records = await self._around.directory.find_progress(self._host.rules.run, self._config.whole)
            others = self._usable(records)
            self._note_samples(others)
            if self._newest(others) > self._host.round or self._has_strayed(others):
                await self.catch_up(others)
            await self._maybe_average(others)
            await self._progress.tell()
            await asyncio.sleep(self._config.poll_seconds)

    async def catch_up(self, others: Sequence[ProgressRecord] | None = None) -> None:
        """Fetch the units of which another holder has a newer version, and stand at the newest round seen."""
        if others is None:
            records = await self._around.directory.find_progress(self._host.rules.run, self._config.whole)
            others = [r for r in records if r.peer != self._around.pool.me]
        newest = self._newest(others)
        found: dict[UnitId, UnitState] = {}
        for unit, own in self._host.units.items():
            block = parse_unit(unit)[1]
            holders = _worth_asking(others, block, own, self._host.digests())[: self._config.max_holders_asked]
            state = await fetch_newest(
                self._around.pool,
                holders,
                unit,
                moments=True,
                digest=unit_digest,
                seconds=self._config.fetch_seconds,
            )
            if state is not None and state.version > own.version:
                found[unit] = state
        number = max(self._host.round, newest)
        if not found and number == self._host.round:
            return
        try:
            await self._host.adopt(found, number)
        except BadAdapter as error:
            logger.warning("fetched units do not fit and were left: %s", error)
            return
        logger.info("caught up round=%d units=%d", number, len(found))

    async def _maybe_average(self, others: Sequence[ProgressRecord]) -> None:
        now = self._around.dht_time()
        number = self.number
        entries = [*(progress_of(record) for record in others), self._progress.own()]
        moment = agreed_start(entries, number, now)
        if moment is None:
            moment = should_begin(self._busiest(others), number, self._config.averaging, now)
            if moment is None:
                return
            self._progress.proposal = (number, moment)
            await self._progress.tell()
        company = [record for record in others if record.round == self._host.round]
        # Who is gone must be neither waited for nor counted as a holder that might average elsewhere.
        await self._around.router.check([record.peer for record in company])
        await self.average(number, moment, self._usable(company))

    async def average(self, number: int, begin_at: float, company: Sequence[ProgressRecord]) -> None:
        """One round with those of `company` who come: average, apply, checkpoint. A round that fails says why."""
        counted = self._host.weights()
        try:
            async with AsyncExitStack() as stack:

                async def read() -> Mapping[UnitId, UnitTensors]:
                    await stack.enter_async_context(self._host.in_round())
                    return await self._host.read_live()

                outcome = await self._averager.run_round(
                    number,
                    begin_at=begin_at,
                    expected=1 + len(company),
                    weights=counted,
                    read=read,
                    link=self._config.link,
                )
                outcome = withhold(outcome, company)
                if not outcome.behind:
                    result = RoundResult(
                        number=number, applied=outcome.applied, weights=outcome.weights, counted=counted
                    )
                    await self._host.apply(result)
        except RoundFailed as error:
            self._progress.proposal = None
            logger.warning("round %d did not happen: %s", number, error)
            return
        self.last, self._progress.proposal = outcome, None
        if outcome.behind:
            await self.catch_up()
            return
        self.rounds_done += 1
        self._log(outcome)
        await self._save()

    def _has_strayed(self, others: Sequence[ProgressRecord]) -> bool:
        """Whether, now and then, a holder that is not behind has other bits of a held unit than this host.

        The round's number alone does not show it: hosts of other blocks tell of a newer round before a holder of ours
        can be asked, as when a whole swarm starts again, and the units would stay behind until the next round.
        """
        now, digests = self._around.dht_time(), self._host.digests()
        if now < self._stray_check_at:
            return False
        strayed = any(
            _worth_asking(others, parse_unit(unit)[1], own, digests) for unit, own in self._host.units.items()
        )
        if strayed:
            self._stray_check_at = now + _STRAY_SECONDS
        return strayed

    def _usable(self, records: Sequence[ProgressRecord]) -> list[ProgressRecord]:
        """The others of whom no call has failed lately."""
        health = self._around.router.health
        return [record for record in records if record.peer != self._around.pool.me and health.is_usable(record.peer)]

    def _newest(self, others: Sequence[ProgressRecord]) -> int:
        """The newest completed round that this peer believes in."""
        return plausible_round(self._host.round, [record.round for record in others], self._config.averaging)

    def _note_samples(self, others: Sequence[ProgressRecord]) -> None:
        """Tell the schedule what the whole run has seen: what rounds have counted, and all holders' samples since."""
        seen: dict[int, int] = {}
        own = self._host.weights()
        for unit, state in self._host.units.items():
            block = parse_unit(unit)[1]
            since = sum(r.samples for r in others if block in r.span and r.round == self._host.round)
            seen[block] = state.total_samples + since + round(own[unit])
        self._host.trainer.note_swarm_samples(seen)

    async def _save(self) -> None:
        try:
            await self._host.checkpoint()
        except BadCheckpoint as error:
            logger.error("%s", error)  # training goes on: the other holders have it too

    def _log(self, outcome: RoundOutcome) -> None:
        logger.info(
            "round done number=%d peers=%d applied=%d kept=%d seconds=%.2f sent=%d received=%d",
            outcome.number,
            len(outcome.peers),
            len(outcome.applied),
            len(outcome.kept),
            outcome.seconds.total,
            outcome.bytes_sent,
            outcome.bytes_received,
        )
        for reason in sorted(set(outcome.kept.values())):
            units = [unit for unit, why in outcome.kept.items() if why == reason]
            logger.warning("round %d kept the old value of %d units: %s", outcome.number, len(units), reason)

    def _busiest(self, others: Sequence[ProgressRecord]) -> list[PeerProgress]:
        """The holders of the block that has seen most: every sample passes one holder of each block, so their sum is
        the run's count, where the sum over all peers would count a sample once per hop.
        """
        best: list[PeerProgress] = []
        own = self._progress.own()
        for block in self._config.whole.blocks():
            holders = [progress_of(record) for record in others if block in record.span]
            if block in self._host.span:
                holders.append(own)
            if sum(entry.samples for entry in holders) > sum(entry.samples for entry in best):
                best = holders
        return best


def withhold(outcome: RoundOutcome, company: Sequence[ProgressRecord]) -> RoundOutcome:
    """Leave out units of which too few live holders came: the others may have averaged them among themselves."""
    reason = "too few of its live holders came"
    kept = {}
    for unit in outcome.applied:
        holders = [record.peer for record in company if parse_unit(unit)[1] in record.span]
        if not has_quorum(1 + sum(peer in outcome.peers for peer in holders), 1 + len(holders)):
            kept[unit] = reason
    applied = {unit: tensors for unit, tensors in outcome.applied.items() if unit not in kept}
    return replace(outcome, applied=applied, kept={**outcome.kept, **kept})


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
