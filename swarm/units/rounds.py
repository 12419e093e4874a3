"""When this peer averages: publishes progress, sees that enough samples are in, runs the round, applies it, catches up.

The rules are in `averaging.rounds`; this is the one place where they meet a host, a directory and a clock.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

from averaging.arrivals import Arrivals
from averaging.averager import Averager, Link, RoundOutcome
from averaging.config import MAX_GROUP_PEERS, AveragingConfig
from averaging.errors import RoundFailed
from averaging.exchange import VERSION_DIGEST_BYTES, Brought, Call, Version
from averaging.grouping import Meeting, meeting_of
from averaging.rounds import (
    MOST_WINDOW_SECONDS,
    Moment,
    Pacing,
    PeerProgress,
    agreed_moment,
    gives_up_at,
    has_quorum,
    least_window,
    plausible_samples,
    should_begin,
)
from averaging.unit_round import UnitInput
from blocks.spans import Span, UnitId, parse_unit
from blocks.training.ledger import Counted
from blocks.unit_state import UnitState
from peers.records import ProgressRecord
from swarm.reports.metrics import Note, Value, no_notes
from swarm.units.book import RoundResult
from swarm.units.catching_up import CatchUp, CatchUpConfig
from swarm.units.company import Company, Surroundings
from swarm.units.holder import Holder
from swarm.units.progress import ProgressTeller, progress_of
from swarm.units.saving import Saver

logger = logging.getLogger(__name__)

_TOO_MANY = (
    "%d hosts share blocks, and this run's rules of rounds need them in one group of at most %d; "
    "use merging 'mean', 'ffa' or 'rolora' without outer optimizer, scaffold, fednova, overlap, int4 or topk"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class KeeperConfig:
    """The run's blocks and its rounds; how often the swarm's progress is read, and every which round is saved. `note`
    takes what came of each round.
    """

    whole: Span
    averaging: AveragingConfig
    link: Link | None = None
    poll_seconds: float = 0.5
    checkpoint_rounds: int = 1
    note: Note = no_notes


class RoundKeeper:
    """Keeps one host in step with its run. Start `run()` in a task group."""

    def __init__(self, host: Holder, averager: Averager, around: Surroundings, config: KeeperConfig) -> None:
        self.last: RoundOutcome | None = None
        self.is_meeting = False
        """Whether a round's group forms or averages with this host now."""
        self.turn = asyncio.Lock()
        """Held while this host looks at the run and averages; who takes it finds the host between rounds."""
        self._host, self._averager, self._around, self._config = host, averager, around, config
        self.company = Company(around, host.rules.run, config.whole)
        self._progress = ProgressTeller(host, around)
        self._catching_up = CatchUp(
            host, around.pool, CatchUpConfig(averaging=config.averaging, can_ask=around.reachable)
        )
        self._saver = Saver(host, config.checkpoint_rounds)
        averaging = config.averaging
        self._arrivals = Arrivals(
            first=averaging.matchmaking_seconds, least=least_window(averaging), most=MOST_WINDOW_SECONDS
        )
        self._last_at = around.dht_time()

    @property
    def number(self) -> int:
        """The round that is to come."""
        return self._host.round + 1

    @property
    def is_away(self) -> bool:
        """Whether this host stays out of rounds."""
        return bool(self._progress.away)

    def words(self) -> str:
        """How the last round went and who is banned, for a line of status; empty before the first."""
        told = []
        if self.last is not None:
            told.append(f"{self.last.seconds.total:.1f} s, {len(self.last.peers)} peers")
            if self.last.merging_error is not None:
                told.append(f"merging error {self.last.merging_error:.1%}")
        if banned := self.company.banned():
            told.append(f"banned: {', '.join(sorted(banned))}")
        return f" ({'; '.join(told)})" if told else ""

    async def run(self) -> None:
        """Follow the run, until cancelled."""
        while True:
            async with self.turn:
                if not self._progress.away:
                    await self._follow()
            await asyncio.sleep(self._config.poll_seconds)

    async def _follow(self) -> None:
        others = await self.company.look()
        self._note_samples(others)
        if self._catching_up.is_needed(others):
            self._averager.forget(await self._catching_up.run(others))
        await self._maybe_average(others)
        await self._progress.tell()

    async def tell_away(self, why: str) -> None:
        """Stay out of rounds from now on and tell the others (`why` is one of peers.records.AWAY); or come again."""
        self._progress.away = why
        await self._progress.tell()

    async def catch_up(self, *, is_start: bool = False, stale: Collection[UnitId] = ()) -> None:
        """Fetch the units of which others have a newer version, and stand at the newest round; see CatchUp."""
        self._averager.forget(await self._catching_up.run(await self.company.look(), is_start=is_start, stale=stale))

    async def _maybe_average(self, others: Sequence[ProgressRecord]) -> None:
        now = self._around.dht_time()
        number = self.number
        entries = [*(progress_of(record) for record in others), self._progress.own()]
        moment = agreed_moment(entries, number, now, self._config.averaging)
        if moment is None:
            pacing = Pacing(now=now, since_last=abs(now - self._last_at), window=self._arrivals.window())
            moment = should_begin(self._busiest(others), number, self._config.averaging, pacing)
            if moment is None:
                return
            self._progress.proposal = (number, moment.begin_at, moment.window)
            await self._progress.tell()
        meeting = self._meeting(others, number)
        if meeting.is_mixing and not self._config.averaging.recipe.can_mix:
            logger.warning("round %d did not happen: %s", number, _TOO_MANY % (len(others) + 1, MAX_GROUP_PEERS))
            return
        company = [r for r in others if r.round == self._host.round and r.peer in meeting.members]
        # Who is gone must be neither waited for nor counted as a holder that might average elsewhere.
        await self.company.ask(company)
        self.is_meeting = True
        try:
            await self.average(number, moment, self.company.usable(company), meeting)
        finally:
            self.is_meeting = False

    def _meeting(self, others: Sequence[ProgressRecord], number: int) -> Meeting:
        """With whom this host averages next, of all who are live."""
        averaging = self._config.averaging
        spans = {record.peer: record.span for record in others} | {self._around.pool.me: self._host.span}
        behind_nat = {record.peer for record in others if record.behind_nat}
        if self._around.behind_nat:
            behind_nat.add(self._around.pool.me)
        most = averaging.group_peers if averaging.recipe.can_mix else MAX_GROUP_PEERS
        meeting = meeting_of(self._around.pool.me, spans, number, most, behind_nat)
        self._catching_up.is_mixing = meeting.is_mixing
        return meeting

    async def average(self, number: int, moment: Moment, company: Sequence[ProgressRecord], meeting: Meeting) -> None:
        """One round with those of `company` who come: average, apply, checkpoint. A round that fails says why."""
        counted = self._host.counted()
        call = _call(moment, 1 + len(company), meeting, self._config.averaging)
        try:
            outcome = await self._average(number, call, company, counted)
        except RoundFailed as error:
            self._progress.proposal = None
            self._arrivals.saw(moment.window, is_full=False)
            logger.warning("round %d did not happen: %s", number, error)
            self._config.note("round_failed", {"round": number, "reason": str(error)[:200]})
            return
        self.last, self._progress.proposal = outcome, None
        self._last_at = self._around.dht_time()
        self.company.judge(outcome)
        if outcome.behind or outcome.stale:
            await self.catch_up(stale=outcome.stale)
        if outcome.behind:
            return
        _log(outcome)
        self._config.note("round", measured(outcome))
        await self._saver.after_round()

    async def _average(
        self, number: int, call: Call, company: Sequence[ProgressRecord], counted: Mapping[UnitId, Counted]
    ) -> RoundOutcome:
        recipe = self._config.averaging.recipe
        inputs: Mapping[UnitId, UnitInput] = {}
        async with AsyncExitStack() as stack:

            async def read() -> Mapping[UnitId, UnitInput]:
                nonlocal inputs
                if not recipe.overlap:
                    await stack.enter_async_context(self._host.in_round())
                inputs = await self._host.read_inputs()
                return inputs

            outcome = await self._averager.run_round(
                number,
                call,
                _brought(self._host.units, counted),
                read,
                link=self._config.link,
                distrusts=self.company.banned(),
            )
            if len(company):
                self._arrivals.saw(outcome.seconds.formed, is_full=len(outcome.peers) > len(company))
            whole, outcome = outcome, withhold(outcome, company)
            self._averager.withdraw(whole.applied.keys() - outcome.applied.keys())
            self._catching_up.came_of(outcome)
            if not outcome.behind:
                if recipe.overlap:
                    await stack.enter_async_context(self._host.in_round())
                result = RoundResult(
                    number=number,
                    applied=outcome.applied,
                    samples=outcome.samples,
                    counted=counted,
                    read=inputs if recipe.overlap else None,
                )
                await self._host.apply(result)
        return outcome

    def _note_samples(self, others: Sequence[ProgressRecord]) -> None:
        """Tell the schedule what the whole run has seen: what rounds have counted, and all holders' samples since."""
        seen: dict[int, int] = {}
        own = self._host.counted()
        most = plausible_samples(0, (0, 0), (), self._config.averaging)  # that one peer can have counted since a round
        for unit, state in self._host.units.items():
            block = parse_unit(unit)[1]
            since = sum(min(most, r.samples) for r in others if block in r.span and r.round == self._host.round)
            seen[block] = state.total_samples + since + own[unit].samples
        self._host.note_swarm_samples(seen)

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


def measured(outcome: RoundOutcome) -> dict[str, Value]:
    """A round in numbers: of units, seconds and bytes; `samples` are those that the unit which saw most weighed."""
    return {
        "round": outcome.number,
        "peers": len(outcome.peers),
        "applied": len(outcome.applied),
        "kept": len(outcome.kept),
        "samples": max(outcome.samples.values(), default=0.0),
        "seconds": round(outcome.seconds.total, 3),
        "sent": outcome.bytes_sent,
        "received": outcome.bytes_received,
        "merging_error": outcome.merging_error,
    }


def _log(outcome: RoundOutcome) -> None:
    logger.info(
        "round done number=%d peers=%d applied=%d kept=%d seconds=%.2f sent=%d received=%d merging_error=%s",
        outcome.number,
        len(outcome.peers),
        len(outcome.applied),
        len(outcome.kept),
        outcome.seconds.total,
        outcome.bytes_sent,
        outcome.bytes_received,
        "none" if outcome.merging_error is None else f"{outcome.merging_error:.4f}",
    )
    for reason in sorted(set(outcome.kept.values())):
        units = [unit for unit, why in outcome.kept.items() if why == reason]
        logger.warning("round %d kept the old value of %d units: %s", outcome.number, len(units), reason)


def _brought(units: Mapping[UnitId, UnitState], counted: Mapping[UnitId, Counted]) -> dict[UnitId, Brought]:
    """What a host has done for each unit, and on which state: signed and shown to the group."""
    return {
        unit: Brought(
            samples=float(counted[unit].samples),
            tokens=float(counted[unit].tokens),
            steps=counted[unit].steps,
            version=Version(number=state.round, weight=state.weight, digest=state.digest[:VERSION_DIGEST_BYTES]),
        )
        for unit, state in units.items()
    }


def _call(moment: Moment, expected: int, meeting: Meeting, config: AveragingConfig) -> Call:
    return Call(
        begin_at=moment.begin_at,
        window=moment.window,
        deadline=gives_up_at(moment, config),
        expected=expected,
        label=meeting.label,
        is_mixing=meeting.is_mixing,
    )
