"""One round from end to end: find the group, divide the units into classes, reduce, vote, and say what came of it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import torch

from averaging import merge, rounds
from averaging.config import AveragingConfig
from averaging.errors import BadTensors, RoundFailed
from averaging.exchange import Contribution, Exchange, Group, Reduced, UnitClass, Vote
from averaging.merge import UnitTensors
from blocks.spans import UnitId
from peers.network import PeerId

logger = logging.getLogger(__name__)

ReadUnits = Callable[[], Awaitable[Mapping[UnitId, UnitTensors]]]
"""Gives the current tensors of all held units, fp32 on the CPU; called once the group stands."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """How this peer is connected; who reduces how much follows from it. A bandwidth of 0 is one not known."""

    megabits_per_second: float = 0.0
    client_mode: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundSeconds:
    """Where a round's time went."""

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

    `applied` holds the new values of the units that were averaged, equal to the bit on all their holders, and of the
    units that nobody else holds, as they were; `weights` the samples behind each. `kept` are units whose old value
    stays, with the reason. When `behind`, nothing applies: the others' newer round must be fetched first.
    """

    number: int
    peers: tuple[PeerId, ...]
    behind: bool = False
    applied: Mapping[UnitId, UnitTensors] = field(default_factory=dict)
    weights: Mapping[UnitId, float] = field(default_factory=dict)
    kept: Mapping[UnitId, str] = field(default_factory=dict)
    left_out: tuple[rounds.LeftOut, ...] = ()
    missing: frozenset[PeerId] = frozenset()
    seconds: RoundSeconds = field(default_factory=RoundSeconds)
    bytes_sent: int = 0
    bytes_received: int = 0


class Averager:
    """Runs rounds for one peer, one after the other. `layout` is a digest of the adapter settings."""

    def __init__(
        self,
        exchange: Exchange,
        me: PeerId,
        layout: str,
        config: AveragingConfig,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._exchange = exchange
        self._me = me
        self._layout = layout
        self._config = config
        self._now = now

    async def run_round(
        self,
        number: int,
        *,
        begin_at: float,
        expected: int,
        weights: Mapping[UnitId, float],
        read: ReadUnits,
        link: Link | None = None,
    ) -> RoundOutcome:
        """Average with whoever comes; `begin_at` is DHT time, `expected` the live peers including this one.

        Raises:
            RoundFailed: others were expected and no group was found.
        """
        clock = time.perf_counter
        mine = Contribution(
            peer=self._me,
            number=number,
            layout=self._layout,
            weights=dict(weights),
            megabits_per_second=link.megabits_per_second if link else 0.0,
            client_mode=link.client_mode if link else False,
        )
        started = clock()
        group = await self._gather(mine, begin_at, expected)
        gathered = clock()
        plan = rounds.plan(group, self._me, self._config)
        peers = tuple(entry.peer for entry in group.contributions)
        seconds = RoundSeconds(matchmaking=gathered - started)
        for entry in plan.left_out:
            logger.debug("left out round=%d peer=%s unit=%s reason=%s", number, entry.peer, entry.unit, entry.reason)
        if plan.behind:
            return RoundOutcome(number=number, peers=peers, behind=True, kept=plan.kept, seconds=seconds)
        current = await self._read(read)
        was_read = clock()
        vectors = await _in_thread(lambda: _vectors(plan, current))
        reduced = await self._exchange.reduce(group, plan.classes, vectors) if plan.classes else {}
        was_reduced = clock()
        decisions = await self._vote(group, plan.classes, reduced)
        seconds = RoundSeconds(
            matchmaking=gathered - started,
            read=was_read - gathered,
            reduce=was_reduced - was_read,
            vote=clock() - was_reduced,
        )
        applied, kept = _result(plan, current, reduced, decisions)
        return RoundOutcome(
            number=number,
            peers=peers,
            applied=applied,
            weights={unit: plan.totals[unit] for unit in applied},
            kept=kept,
            left_out=plan.left_out,
            missing=frozenset[PeerId]().union(*(entry.missing for entry in reduced.values())),
            seconds=seconds,
            bytes_sent=sum(entry.bytes_sent for entry in reduced.values()),
            bytes_received=sum(entry.bytes_received for entry in reduced.values()),
        )

    async def _gather(self, mine: Contribution, begin_at: float, expected: int) -> Group:
        if expected <= 1:
            return Group(group_id=b"alone", contributions=(mine,))
        # Twice: hivemind declares itself anew once when nobody answered the first time.
        deadline = max(begin_at, self._now()) + 2 * self._config.matchmaking_seconds + self._config.request_seconds
        group = await self._exchange.gather(mine, begin_at=begin_at, deadline=deadline, expected=expected)
        if group is None:
            raise RoundFailed(
                f"round {mine.number}: no group of {self._config.min_peers} or more formed within "
                f"{deadline - begin_at:.1f} s though {expected} peers were expected; the next round tries again"
            )
        return group

    async def _read(self, read: ReadUnits) -> Mapping[UnitId, UnitTensors]:
        """The units as they are; none when the caller is too slow, so that the others hear of it and go on."""
        try:
            async with asyncio.timeout(self._config.read_seconds):
                return await read()
        except TimeoutError:
            logger.warning("units were not read within %g s", self._config.read_seconds)
            return {}

    async def _vote(
        self, group: Group, classes: tuple[UnitClass, ...], reduced: Mapping[bytes, Reduced]
    ) -> Mapping[bytes, rounds.Applied | rounds.Kept]:
        if not classes:
            return {}
        mine = {
            key: Vote(class_id=key, complete=entry.tensors is not None, digest=entry.digest)
            for key, entry in reduced.items()
        }
        deadline = self._now() + self._config.vote_seconds
        votes = await self._exchange.vote(group, classes, mine, deadline=deadline)
        return {entry.class_id: rounds.decide(entry, votes.get(entry.class_id, {}), self._me) for entry in classes}


def _vectors(plan: rounds.Plan, current: Mapping[UnitId, UnitTensors]) -> dict[bytes, tuple[torch.Tensor, ...]]:
    """The scaled vector of each class; a class that cannot be read is left out, which the exchange tells the others."""
    vectors: dict[bytes, tuple[torch.Tensor, ...]] = {}
    for entry in plan.classes:
        try:
            vectors[entry.class_id] = (merge.flatten(entry.units, current, plan.shares),)
        except BadTensors as error:
            logger.warning("class not brought units=%d reason=%s", len(entry.units), error)
    return vectors


def _result(
    plan: rounds.Plan,
    current: Mapping[UnitId, UnitTensors],
    reduced: Mapping[bytes, Reduced],
    decisions: Mapping[bytes, rounds.Applied | rounds.Kept],
) -> tuple[dict[UnitId, UnitTensors], dict[UnitId, str]]:
    applied: dict[UnitId, UnitTensors] = {}
    kept = dict(plan.kept)
    for unit in plan.alone:
        if current.get(unit):
            applied[unit] = current[unit]
        else:
            kept[unit] = "it is not held any more"
    for entry in plan.classes:
        result, decision = reduced[entry.class_id], decisions[entry.class_id]
        if isinstance(decision, rounds.Applied) and result.tensors is not None:
            applied.update(merge.unflatten(result.tensors[0], entry.units, current))
        else:
            why = result.reason or (decision.reason if isinstance(decision, rounds.Kept) else "")
            kept.update(dict.fromkeys(entry.units, why))
    return applied, kept


async def _in_thread(
    work: Callable[[], dict[bytes, tuple[torch.Tensor, ...]]],
) -> dict[bytes, tuple[torch.Tensor, ...]]:
    """Run tensor work off the loop, which has streams to serve."""
    return await asyncio.get_running_loop().run_in_executor(None, work)
