"""One round from end to end: find the group, divide the units into classes, reduce, vote, and say what came of it."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from averaging import planning, rounds
from averaging.config import AveragingConfig
from averaging.errors import RoundFailed
from averaging.exchange import Brought, Call, Contribution, Exchange, Group, Reduced, Vote
from averaging.feedback import Feedback
from averaging.helping import helped_work
from averaging.planning import LeftOut, Plan
from averaging.unit_round import UnitInput, UnitResult, UnitRules
from averaging.unit_work import RoundWork
from blocks.spans import UnitId
from peers.network import PeerId

logger = logging.getLogger(__name__)

T = TypeVar("T")

ReadUnits = Callable[[], Awaitable[Mapping[UnitId, UnitInput]]]
"""Gives the current values of all held units, fp32 on the CPU; called once the group stands."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """How this peer is connected; who reduces how much follows from it. A bandwidth of 0 is one not known."""

    megabits_per_second: float = 0.0
    client_mode: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundSeconds:
    """Where a round's time went; `formed` is when its group stood, after the agreed moment."""

    formed: float = 0.0
    matchmaking: float = 0.0
    read: float = 0.0
    reduce: float = 0.0
    vote: float = 0.0

    @property
    def total(self) -> float:
        """All phases."""
        return self.matchmaking + self.read + self.reduce + self.vote


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundOutcome:
    """What a round changes here.

    `applied` holds the new state of the units that were averaged, equal to the bit on all their holders, and of those
    that nobody else holds; `samples` are those behind each. `kept` are units whose old value stays, with the reason;
    of `stale` ones another holder has a newer state. `missing` could not finish, and `spoilers` alone kept a class from
    applying in which all others agreed. When `behind`, nothing applies: the others' newer round must be
    fetched first. `offenders` are those whom most holders of a class accuse. `merging_error` is the relative error of
    the merged products against the mean of the holders' products; None where nothing was merged. `helped` counts
    classes of peers behind NAT that this peer reduced without holding them.
    """

    number: int
    peers: tuple[PeerId, ...]
    behind: bool = False
    applied: Mapping[UnitId, UnitResult] = field(default_factory=dict)
    samples: Mapping[UnitId, float] = field(default_factory=dict)
    kept: Mapping[UnitId, str] = field(default_factory=dict)
    stale: frozenset[UnitId] = frozenset()
    left_out: tuple[LeftOut, ...] = ()
    missing: frozenset[PeerId] = frozenset()
    offenders: frozenset[PeerId] = frozenset()
    spoilers: frozenset[PeerId] = frozenset()
    merging_error: float | None = None
    seconds: RoundSeconds = field(default_factory=RoundSeconds)
    helped: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0


class Averager:
    """Runs rounds for one peer, one after the other. `layout` is a digest of the adapter's settings."""

    def __init__(
        self,
        exchange: Exchange,
        me: PeerId,
        layout: str,
        config: AveragingConfig,
        *,
        rules: UnitRules | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._exchange = exchange
        self._me = me
        self._config = config
        self._layout = hashlib.sha256(f"{layout}|{config.recipe.digest}".encode()).hexdigest()[:48]
        self._rules = rules or UnitRules(config.recipe)
        self._now = now
        self._feedback = Feedback()

    def forget(self, units: Iterable[UnitId]) -> None:
        """These units were replaced by another holder's state."""
        self._feedback.forget(list(units))

    def withdraw(self, units: Iterable[UnitId]) -> None:
        """What the last round made of these units was not applied after all."""
        self._feedback.withdraw(units)

    async def run_round(
        self,
        number: int,
        call: Call,
        units: Mapping[UnitId, Brought],
        read: ReadUnits,
        *,
        link: Link | None = None,
        distrusts: frozenset[PeerId] = frozenset(),
    ) -> RoundOutcome:
        """Average `units` with whoever comes at `call`.

        Raises:
            RoundFailed: others were expected and no group was found.
        """
        clock = time.perf_counter
        mine = replace(self._contribution(number, call, link or Link()), units=dict(units), distrusts=distrusts)
        started = clock()
        group = await self._gather(mine, call)
        gathered = clock()
        formed = max(0.0, self._now() - call.begin_at)
        plan = planning.plan(group, self._me, self._config, is_mixing=call.is_mixing)
        for entry in plan.left_out:
            logger.debug("left out round=%d peer=%s unit=%s reason=%s", number, entry.peer, entry.unit, entry.reason)
        peers = tuple(entry.peer for entry in group.contributions)
        seconds = RoundSeconds(formed=formed, matchmaking=gathered - started)
        if plan.behind:
            return RoundOutcome(number=number, peers=peers, behind=True, kept=plan.kept, seconds=seconds)
        inputs = await self._read(read)
        if call.is_mixing:
            inputs = {unit: self._rules.whole(given) for unit, given in inputs.items()}
        work = RoundWork(self._rules, plan, inputs, number)
        was_read = clock()
        reduced, helped = await self._reduce(group, plan, work)
        was_reduced = clock()
        votes = await self._vote(group, plan, work, reduced)
        applied, kept, error = await self._finish(plan, work, reduced, votes)
        return RoundOutcome(
            number=number,
            peers=peers,
            applied=applied,
            samples={unit: plan.samples[unit] for unit in applied},
            kept=kept,
            stale=plan.stale,
            left_out=plan.left_out,
            missing=_union(entry.missing for entry in reduced.values()),
            spoilers=frozenset(
                peer
                for entry in plan.classes
                if (peer := rounds.spoiler(entry, votes.get(entry.class_id, {}))) is not None
            ),
            offenders=_union(rounds.offenders(entry, votes.get(entry.class_id, {})) for entry in plan.classes),
            merging_error=error,
            seconds=replace(
                seconds, read=was_read - gathered, reduce=was_reduced - was_read, vote=clock() - was_reduced
            ),
            helped=sum(not entry.reason for entry in helped),
            bytes_sent=sum(entry.bytes_sent for entry in (*reduced.values(), *helped)),
            bytes_received=sum(entry.bytes_received for entry in (*reduced.values(), *helped)),
        )

    def _contribution(self, number: int, call: Call, link: Link) -> Contribution:
        return Contribution(
            peer=self._me,
            number=number,
            layout=self._layout + ("/mixing" if call.is_mixing else ""),
            units={},
            megabits_per_second=link.megabits_per_second,
            client_mode=link.client_mode,
        )

    async def _finish(
        self,
        plan: Plan,
        work: RoundWork,
        reduced: Mapping[bytes, Reduced],
        votes: Mapping[bytes, Mapping[PeerId, Vote]],
    ) -> tuple[dict[UnitId, UnitResult], dict[UnitId, str], float | None]:
        decisions = {
            entry.class_id: rounds.decide(entry, votes.get(entry.class_id, {}), self._me) for entry in plan.classes
        }
        return await _in_thread(lambda: work.finish(reduced, decisions, votes, self._feedback))

    async def _gather(self, mine: Contribution, call: Call) -> Group:
        if call.expected <= 1:
            return Group(group_id=b"alone", contributions=(mine,))
        group = await self._exchange.gather(mine, call)
        if group is None:
            raise RoundFailed(
                f"round {mine.number}: no group of {self._config.min_peers} or more formed within "
                f"{call.deadline - call.begin_at:.1f} s though {call.expected} peers were expected; "
                "the next round tries again"
            )
        return group

    async def _read(self, read: ReadUnits) -> Mapping[UnitId, UnitInput]:
        """The units as they are; none when the caller is too slow, so that the others hear of it and go on."""
        try:
            async with asyncio.timeout(self._config.read_seconds):
                return await read()
        except TimeoutError:
            logger.warning("units were not read within %g s", self._config.read_seconds)
            return {}

    async def _reduce(
        self, group: Group, plan: Plan, work: RoundWork
    ) -> tuple[dict[bytes, Reduced], tuple[Reduced, ...]]:
        """All passes, all classes at once in each, and what came of the classes of others that this peer reduces for.

        A class that fails in one pass does not come to the next. Who helps does so in the first.
        """
        reduced: dict[bytes, Reduced] = {}
        helped = await _in_thread(lambda: helped_work(group, plan, self._rules)) if plan.helped else []
        done: tuple[Reduced, ...] = ()
        for index in range(self._rules.merging.passes if plan.classes or helped else 0):
            entries = await _in_thread(lambda: work.entries(self._feedback))
            results = await self._exchange.reduce(group, entries + helped if not index else entries)
            for unit_class, entry in zip(plan.classes, entries, strict=True):
                result = results[entry.unit_class.class_id]
                earlier = reduced.get(unit_class.class_id)
                reduced[unit_class.class_id] = _joined(earlier, result)
            done = done or tuple(results[entry.unit_class.class_id] for entry in helped)
            await _in_thread(lambda: work.take_means(reduced))
        return reduced, done

    async def _vote(
        self, group: Group, plan: Plan, work: RoundWork, reduced: Mapping[bytes, Reduced]
    ) -> Mapping[bytes, Mapping[PeerId, Vote]]:
        classes = plan.classes
        if not classes and not plan.helped:
            return {}
        probes = await _in_thread(lambda: {entry.class_id: work.probes(entry) for entry in classes})
        mine = {
            key: Vote(
                class_id=key,
                complete=entry.mean is not None,
                digest=entry.digest,
                dropped=entry.dropped,
                doubted=entry.doubted,
                probes=probes[key],
            )
            for key, entry in reduced.items()
        }
        deadline = self._now() + self._config.vote_seconds
        return await self._exchange.vote(group, classes, mine, deadline=deadline)


def _joined(earlier: Reduced | None, later: Reduced) -> Reduced:
    """Two passes of one class as one: whole when both are, with what both have counted and the digest of both."""
    if earlier is None:
        return later
    return Reduced(
        mean=later.mean if earlier.mean is not None else None,
        digest=hashlib.sha256(earlier.digest + later.digest).digest(),
        reason=earlier.reason or later.reason,
        bytes_sent=earlier.bytes_sent + later.bytes_sent,
        bytes_received=earlier.bytes_received + later.bytes_received,
        missing=earlier.missing | later.missing,
        dropped=earlier.dropped | later.dropped,
        doubted=earlier.doubted | later.doubted,
        owed_sent=later.owed_sent,
        owed_sum=later.owed_sum,
    )


def _union(sets: Iterable[frozenset[PeerId]]) -> frozenset[PeerId]:
    return frozenset[PeerId]().union(*sets)


async def _in_thread(work: Callable[[], T]) -> T:
    """Run tensor work off the loop, which has streams to serve."""
    return await asyncio.get_running_loop().run_in_executor(None, work)
