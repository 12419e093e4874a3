"""A host that steps back: for a while, at its owner's word or outside its hours, or for good. It says so first, then
finishes what is in flight; process, model and state stay.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from peers.chains.decode_service import DecodeService
from peers.errors import NetworkFailed
from peers.network import PeerId
from peers.streams.work_gate import WorkGate
from swarm.hosts.host import Host
from swarm.hosts.hours import Hours
from swarm.hosts.pause_file import PauseFile, mark_hosting
from swarm.state import StateDirectory
from swarm.units.rounds import RoundKeeper

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
_FOR_GOOD = ("leaving", "moving")
_CLOSED_WORDS = {
    "hand": "this host is paused; try another host",
    "hours": "this host is outside its hours; try another host",
    "leaving": "this host is leaving; try another host",
    "moving": "this host is going to hold other blocks; try another host",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long a host that steps back waits, in seconds.

    `notice`: until the trainers that are connected must have read that it is away (a router reads every 3 s); none of
    them need have asked anything in that time, as each sends its work now here and now there. Then `quiet` without a
    question, for at most `linger`, as one of them may be slow to read. `rounds`: for the round that it is in;
    `finish`: for what is in flight once new work is refused. Where `sessions`, that includes texts, which else go on
    at another host.
    """

    notice: float = 4.0
    quiet: float = 1.0
    linger: float = 2.0
    rounds: float = 120.0
    finish: float = 20.0
    sessions: bool = True


LEAVING = Patience(rounds=5.0, finish=4.0, sessions=False)
TO_A_GAP = Patience(notice=0.0, quiet=0.0, linger=0.0, rounds=5.0, finish=1.0, sessions=False)
"""Of who is going to hold blocks that nobody holds: work in flight goes through them, too, and cannot end before that.
Who asks for the old blocks is told, and reads this peer's record anew (router.refused)."""
LEAVE_SECONDS = 12.0  # all of it; whoever sent SIGTERM sends SIGKILL at some time


class Announcing(Protocol):
    """The part of hosting.Announcer that stepping back needs."""

    away: str

    async def announce(self) -> None:
        """Publish the record as of now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostParts:
    """What of a host takes part in stepping back; `train` and `decode` are the gates before its services."""

    me: PeerId
    host: Host
    keeper: RoundKeeper
    announcer: Announcing
    train: WorkGate
    decode: WorkGate
    sessions: DecodeService


class Withdrawal:
    """Takes one host out of the swarm and back in; one at a time."""

    def __init__(self, parts: HostParts, clock: Callable[[], float] = time.monotonic) -> None:
        self._parts, self._clock = parts, clock
        self._lock = asyncio.Lock()

    async def step_back(self, why: str, patience: Patience) -> None:
        """Serve nobody from now on; `why` is one of peers.records.AWAY. Returns when nothing is in flight. A host that
        is leaving is not paused any more.

        Raises:
            NetworkFailed: the others cannot be told.
        """
        async with self._lock:
            parts = self._parts
            if parts.announcer.away in _FOR_GOOD and why not in _FOR_GOOD:
                return
            parts.announcer.away = why
            await parts.announcer.announce()
            told_at = self._clock()
            await self._leave_rounds(why, patience.rounds)
            await self._until(lambda: not parts.train.has_trainers, told_at + patience.notice - self._clock())
            await self._until(lambda: parts.train.is_quiet(patience.quiet), patience.linger)
            parts.train.why = parts.decode.why = _CLOSED_WORDS[why]
            done = await self._until(lambda: self._is_done(sessions=patience.sessions), patience.finish)
            if not done:
                logger.warning("stepped back with work in flight after %.0f s", patience.finish)
            if patience.sessions:
                await parts.sessions.end_all()
            logger.info("stepped back reason=%s seconds=%.1f", why, self._clock() - told_at)

    async def come_back(self) -> None:
        """Catch up with the others, then serve them again; nothing where this host is leaving.

        Raises:
            NetworkFailed: the others cannot be told.
        """
        async with self._lock:
            parts = self._parts
            if parts.announcer.away in _FOR_GOOD:
                return
            async with parts.keeper.turn:
                await parts.keeper.catch_up()
                await parts.keeper.tell_away("")
            parts.train.why = parts.decode.why = parts.announcer.away = ""
            await parts.announcer.announce()
            logger.info("came back round=%d", parts.host.round)

    async def leave(self, why: str = "leaving", patience: Patience = LEAVING) -> None:
        """Step back for good, as far as the network and the time allow; "moving" is from these blocks to others."""
        try:
            async with asyncio.timeout(LEAVE_SECONDS):
                await self.step_back(why, patience)
        except NetworkFailed as error:
            logger.info("left without a word: %s", error)  # p2pd is gone; the record expires by itself
        except TimeoutError:
            logger.warning("left after %.0f s, with work in flight", LEAVE_SECONDS)

    async def _leave_rounds(self, why: str, seconds: float) -> None:
        """After the round that is under way, as the others count on this host in it."""
        keeper = self._parts.keeper
        try:
            async with asyncio.timeout(seconds), keeper.turn:
                await keeper.tell_away(why)
        except TimeoutError:
            logger.warning("stepped back in the middle of a round, after %.0f s", seconds)
            await keeper.tell_away(why)

    async def _until(self, happened: Callable[[], bool], seconds: float) -> bool:
        deadline = self._clock() + seconds
        while not happened():
            if self._clock() >= deadline:
                return False
            await asyncio.sleep(0.05)
        return True

    def _is_done(self, *, sessions: bool) -> bool:
        """Whether every microbatch of others is counted or dropped, and the steps that are due are made."""
        parts = self._parts
        ledger = parts.host.trainer.ledger
        held = any(piece.microbatch.trainer != parts.me for piece in ledger.pieces())
        texts = sessions and len(parts.sessions) > 0
        return not (held or parts.train.answering or ledger.due() or texts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Switch:
    """Why a host should be away now: its owner's word, or the time of day. `now` is the local wall clock."""

    file: PauseFile
    hours: Hours | None = None
    now: Callable[[], datetime] = datetime.now

    def why(self) -> str:
        """`hand`, `hours`, or nothing."""
        if self.file.is_paused():
            return "hand"
        return "" if self.hours is None or self.hours.includes(self.now().time()) else "hours"

    def words(self, why: str) -> str:
        """What a line of status says of it; empty where there is nothing to say."""
        if why == "hand":
            return "paused by hand, `swarm resume` ends it"
        if why != "hours" or self.hours is None:
            return ""
        change = self.hours.next_change(self.now().time())
        return "paused by --hours" + ("" if change is None else f" until {change:%H:%M}")


class Pauser:
    """Follows the switch: one host is away while it says so. Start `run()` after `begin()`; `close` at the end."""

    def __init__(self, withdrawal: Withdrawal, switch: Switch, state: Path) -> None:
        """`state` is the peer's state directory, where `swarm pause` looks for it."""
        self.why, self.withdrawal, self.switch = "", withdrawal, switch
        self._state = state
        self._mark: StateDirectory | None = None

    def words(self) -> str:
        """For a line of status; empty while this host is not away."""
        return self.switch.words(self.why)

    async def begin(self) -> None:
        """Before the host is announced: one that is paused at its start does nothing for others from the first.

        Raises:
            BadConfig: the state directory cannot be written.
            NetworkFailed: the others cannot be told.
        """
        self._mark = mark_hosting(self._state)
        await self._follow()

    async def run(self) -> None:
        """Look every second, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self._follow()

    def close(self) -> None:
        """This peer hosts no more."""
        if self._mark is not None:
            self._mark.close()
            self._mark = None

    async def _follow(self) -> None:
        why = await asyncio.to_thread(self.switch.why)
        if why == self.why:
            return
        self.why = why
        logger.warning("%s", self.words() or "no longer paused")
        if why:
            await self.withdrawal.step_back(why, Patience())
        else:
            await self.withdrawal.come_back()
