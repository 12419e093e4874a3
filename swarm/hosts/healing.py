"""Where this host belongs: it watches what the swarm holds, and moves when its move is the one that helps most.

The rules are in `peers.placing.moving`; here they meet records, probes and a clock. Everybody computes the same move
from the same records, and only the peer that it names does anything: it promises the new span in its record, looks
again once the others can have seen that, and only then leaves its blocks. Training goes on around it over the others.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from blocks.spans import Span
from peers.errors import NetworkFailed
from peers.network import PeerId
from peers.placing.moving import Move, MovingRules, Turn, next_move, still_right
from peers.placing.standing import Standing, standings_of
from peers.records import PeerRecord
from peers.routes.router import LiveRouter

logger = logging.getLogger(__name__)

_MOST_WATCHED = 16  # sole holders that one peer asks at each look whether they are there


class Mover(Protocol):
    """A host that can hold other blocks."""

    @property
    def is_away(self) -> bool:
        """Whether it serves nobody now: paused, or leaving."""

    async def promise(self, span: Span | None) -> None:
        """Tell the others which span it is going to hold instead; None: it stays.

        Raises:
            NetworkFailed: they cannot be told.
        """

    async def move(self, span: Span, *, to_a_gap: bool = False) -> bool:
        """Hold `span` instead; `to_a_gap`: the swarm has no chain without this move. False: it cannot be loaded, and
        what was held before is held again.

        Raises:
            BlockError, SwarmError, PeerError: nothing can be held any more.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class HealerConfig:
    """Who this host is, how many blocks the model has, and the rules by which hosts move. Who promised and does not
    answer for `silent_looks` in a row is gone, though its record lives on; one look is not enough, as loading is work.
    """

    me: PeerId
    num_blocks: int
    rules: MovingRules = field(default_factory=MovingRules)
    look_seconds: float = 2.0
    silent_looks: int = 2


class Healer:
    """Follows the swarm's holdings for one host whose span nobody chose by hand. Start `run()` in a task group."""

    def __init__(
        self,
        mover: Mover,
        router: LiveRouter,
        now: Callable[[], float],
        config: HealerConfig,
        *,
        is_there: Callable[[PeerId], Awaitable[bool]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`now` is DHT time, by which records are dated; `is_there` asks a peer that may serve nothing yet."""
        self._mover, self._router, self._now, self._config = mover, router, now, config
        self._is_there, self._clock = is_there, clock
        self._turn = Turn()
        self._silent: dict[PeerId, int] = {}

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await asyncio.sleep(self._config.look_seconds)
            if not self._mover.is_away:
                await self._look()

    async def _look(self) -> None:
        await self._watch()
        move = next_move(
            self._standings(),
            self._config.num_blocks,
            self._now(),
            rules=self._config.rules,
            passed_over=self._turn.passed_over,
        )
        self._turn = self._turn.after(move, self._clock(), self._config.rules)  # which no clock that jumps prolongs
        if move is None or move.peer != self._config.me:
            return
        try:
            if not await self._make(move):  # or it would be elected again and again
                self._turn = Turn(passed_over=self._turn.passed_over | {move.peer})
        except NetworkFailed as error:
            logger.warning("blocks %s: a move to %s cannot be made now: %s", move.leaves, move.span, error)

    async def _watch(self) -> None:
        """Ask those on whom blocks depend whether they are there, as records outlive their makers by a minute."""
        usable, me = self._usable(), self._config.me
        serving = dict.fromkeys(sole_holders(usable, self._config.num_blocks, me) + promisers(usable, me, "host"))
        await self._router.check(list(serving)[:_MOST_WATCHED])
        loading = promisers(self._router.found, me, "")[:_MOST_WATCHED]
        answers = await asyncio.gather(*(self._is_there(peer) for peer in loading))
        self._silent = {
            peer: 0 if there else self._silent.get(peer, 0) + 1 for peer, there in zip(loading, answers, strict=True)
        }

    async def _make(self, move: Move) -> bool:
        """False: it turned out that it cannot be made here."""
        logger.info("going to hold blocks=%s in place of %s reason=%s", move.span, move.leaves, move.reason)
        await self._mover.promise(move.span)
        await asyncio.sleep(self._config.rules.settle_seconds)
        await self._router.refresh()
        if self._mover.is_away:
            return True
        if still_right(move, self._standings(), self._config.num_blocks, self._now(), rules=self._config.rules):
            return await self._mover.move(move.span, to_a_gap=move.reason != "balance")
        logger.info("staying with blocks=%s: others have moved", move.leaves)
        await self._mover.promise(None)
        return True

    def _usable(self) -> list[PeerRecord]:
        """Of all records, those of peers that were there when they were last asked."""
        health, config = self._router.health, self._config

        def is_usable(record: PeerRecord) -> bool:
            if "host" not in record.roles and record.moves_to:
                return self._silent.get(record.peer, 0) < config.silent_looks
            return health.is_usable(record.peer)

        return [record for record in self._router.found if record.peer == config.me or is_usable(record)]

    def _standings(self) -> list[Standing]:
        return standings_of(self._usable(), self._config.num_blocks, self._now())


def promisers(records: Sequence[PeerRecord], me: PeerId, role: Literal["host", ""]) -> list[PeerId]:
    """The others that have promised to hold some blocks, by id: those that serve others until then, or ("") load."""
    return sorted(
        record.peer
        for record in records
        if record.peer != me and record.moves_to and ("host" in record.roles) == (role == "host")
    )


def sole_holders(records: Sequence[PeerRecord], num_blocks: int, me: PeerId) -> list[PeerId]:
    """The others that hold some block alone, by id: when one of them goes, a block is gone, and a record tells late."""
    hosts = [record for record in records if "host" in record.roles]
    count = Counter(block for record in hosts for block in record.span.blocks() if block < num_blocks)
    return sorted(
        record.peer
        for record in hosts
        if record.peer != me and any(count[block] == 1 for block in record.span.blocks())
    )
