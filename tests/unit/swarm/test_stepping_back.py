"""In which order a host steps back and returns, how long it waits, and what its owner's word and the clock do."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from blocks.spans import Span
from blocks.training.ledger import Ledger, MicrobatchId, Piece
from peers.errors import NetworkFailed
from peers.network import PeerId
from swarm.hosts import pausing
from swarm.hosts.hours import parse_hours
from swarm.hosts.pause_file import PauseFile, is_hosting, say_pause, say_resume
from swarm.hosts.pausing import HostParts, Patience, Pauser, Switch, Withdrawal

ME, ANN = PeerId("me"), PeerId("ann")
SHORT = Patience(notice=0.2, quiet=0.1, linger=0.2, rounds=0.2, finish=0.2)


class Gate(SimpleNamespace):
    """The gate before training, as quiet as `parts` says."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(why="", answering=0, is_quiet=lambda seconds: not parts.busy)
        self._parts = parts

    @property
    def has_trainers(self) -> bool:
        return self._parts.trainers


@dataclass
class Parts:
    """A host's parts as far as stepping back needs them; `did` says what happened, in order."""

    did: list[str] = field(default_factory=list)
    events: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    away: str = ""
    error: Exception | None = None
    trainers: bool = False
    busy: bool = False
    sessions: int = 0
    in_round: asyncio.Lock = field(default_factory=asyncio.Lock)
    ledger: Ledger = field(default_factory=lambda: Ledger(Span(0, 1), batch_size=4))

    def _note(self, what: str) -> None:
        self.did.append(what)
        self.events.put_nowait(what)

    async def see(self, what: str) -> None:
        """Wait until something was done that was not seen before."""
        async with asyncio.timeout(30):
            while await self.events.get() != what:
                pass

    def build(self) -> HostParts:
        gate = Gate(self)
        return HostParts(
            me=ME,
            host=SimpleNamespace(trainer=SimpleNamespace(ledger=self.ledger), round=3),
            keeper=SimpleNamespace(turn=self.in_round, tell_away=self.tell_away, catch_up=self.catch_up),
            announcer=self,
            train=gate,
            decode=SimpleNamespace(why=""),
            sessions=self,
        )

    async def announce(self) -> None:
        if self.error is not None:
            raise self.error
        self._note(f"announced {self.away or 'host'}")

    async def tell_away(self, why: str) -> None:
        self._note(f"rounds {'without' if why else 'with'} it")

    async def catch_up(self) -> None:
        self._note("caught up")

    async def end_all(self) -> None:
        self._note("ended texts")

    def __len__(self) -> int:
        return self.sessions

    def open_piece(self, trainer: PeerId) -> Piece:
        piece = Piece(MicrobatchId(trainer=trainer, life=1, step=1, index=0), Span(0, 1))
        self.ledger.open(piece, samples=1, deadline=1e9)
        return piece


@pytest.fixture
async def parts() -> Parts:
    return Parts()


async def test_a_host_says_so_first_and_returns_when_it_has_caught_up(parts: Parts) -> None:
    built = parts.build()
    withdrawal = Withdrawal(built)
    async with asyncio.timeout(30):
        await withdrawal.step_back("hand", Patience())
        assert parts.did == ["announced hand", "rounds without it", "ended texts"]
        assert "paused" in built.train.why
        assert built.decode.why == built.train.why
        parts.did.clear()
        await withdrawal.come_back()
    assert parts.did == ["caught up", "rounds with it", "announced host"]
    assert (built.train.why, built.decode.why, parts.away) == ("", "", "")


async def test_new_work_is_taken_until_those_who_send_it_must_know(parts: Parts) -> None:
    parts.busy, built = True, parts.build()
    task = asyncio.create_task(Withdrawal(built).step_back("hand", Patience(linger=3600)))
    async with asyncio.timeout(30):
        await parts.see("rounds without it")
        assert not built.train.why
        parts.busy = False
        await task
        assert built.train.why
        parts.busy = True
        await Withdrawal(built).step_back("hand", SHORT)  # who goes on asking is refused in the end


async def test_a_trainer_that_asks_nothing_for_a_while_still_needs_the_time_to_read_of_it(parts: Parts) -> None:
    parts.trainers, built = True, parts.build()
    task = asyncio.create_task(Withdrawal(built).step_back("hand", Patience(notice=3600)))
    async with asyncio.timeout(30):
        await parts.see("rounds without it")
        assert not (await asyncio.wait([task], timeout=0.2))[0]
        assert not built.train.why
        parts.trainers = False
        await task
        assert built.train.why
        parts.trainers = True
        await Withdrawal(built).step_back("hand", SHORT)  # one that stays must know by then


async def test_microbatches_of_others_are_waited_for_but_not_ones_own(parts: Parts) -> None:
    parts.open_piece(ME)
    async with asyncio.timeout(30):
        await Withdrawal(parts.build()).step_back("hand", Patience(finish=3600))
        piece = parts.open_piece(ANN)
        task = asyncio.create_task(Withdrawal(parts.build()).step_back("hand", Patience(finish=3600)))
        assert not (await asyncio.wait([task], timeout=0.2))[0]
        parts.ledger.answer(piece, tokens=1, deadline=1e9)
        assert not (await asyncio.wait([task], timeout=0.2))[0], "it may still be committed"
        parts.ledger.commit(piece)
        await task


async def test_an_answer_a_step_and_a_text_are_waited_for(parts: Parts) -> None:
    built = parts.build()
    patient = Patience(finish=3600)

    async def waits() -> asyncio.Task[None]:
        task = asyncio.create_task(Withdrawal(built).step_back("hand", patient))
        assert not (await asyncio.wait([task], timeout=0.2))[0]
        return task

    async with asyncio.timeout(30):
        built.train.answering = 1
        task = await waits()
        built.train.answering = 0
        await task
        parts.ledger.tallies[0].samples = 4
        task = await waits()
        parts.ledger.stepped(0)
        await task
        parts.sessions = 1
        task = await waits()
        parts.sessions = 0
        await task


async def test_nothing_is_waited_for_without_end(parts: Parts, caplog: pytest.LogCaptureFixture) -> None:
    parts.busy, parts.sessions = True, 2
    parts.open_piece(ANN)
    async with asyncio.timeout(30):
        await parts.in_round.acquire()  # a round that does not end
        await Withdrawal(parts.build()).step_back("hours", SHORT)
    assert parts.did == ["announced hours", "rounds without it", "ended texts"]
    said = [record.getMessage() for record in caplog.records]
    assert any("in the middle of a round" in line for line in said)
    assert any("with work in flight" in line for line in said)


async def test_the_round_that_is_under_way_ends_first(parts: Parts) -> None:
    await parts.in_round.acquire()
    task = asyncio.create_task(Withdrawal(parts.build()).step_back("hand", Patience()))
    async with asyncio.timeout(30):
        assert not (await asyncio.wait([task], timeout=0.2))[0]
        assert parts.did == ["announced hand"]
        parts.in_round.release()
        await task
    assert not parts.in_round.locked()


async def test_who_leaves_waits_for_no_text_and_does_not_come_back(parts: Parts) -> None:
    parts.sessions, built = 1, parts.build()
    withdrawal = Withdrawal(built)
    async with asyncio.timeout(30):
        await withdrawal.leave()
        assert parts.did == ["announced leaving", "rounds without it"]
        await withdrawal.come_back()
        await withdrawal.step_back("hand", SHORT)
    assert parts.did[2:] == []
    assert "leaving" in built.train.why


async def test_who_goes_where_nobody_is_does_not_wait_for_what_cannot_end(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = []

    async def until(self: Withdrawal, happened: object, seconds: float) -> bool:
        times.append(seconds)
        return False

    monkeypatch.setattr(Withdrawal, "_until", until)
    built = parts.build()
    await Withdrawal(built).leave("moving", pausing.TO_A_GAP)
    assert max(times) <= 1.0
    assert "other blocks" in built.train.why
    times.clear()
    await Withdrawal(built).leave("moving")
    assert max(times) >= 3.0, "a move for balance lets everything end"


async def test_who_cannot_say_that_it_leaves_goes_all_the_same(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parts.error = NetworkFailed("p2pd is gone")
    await Withdrawal(parts.build()).leave()
    parts.error = None
    parts.open_piece(ANN)
    monkeypatch.setattr(pausing, "LEAVE_SECONDS", 0.2)
    async with asyncio.timeout(30):
        await Withdrawal(parts.build()).leave()
    assert "left after 0 s, with work in flight" in caplog.text


class Wall:
    """The local wall clock."""

    def __init__(self, hour: int) -> None:
        self.hour = hour

    def __call__(self) -> datetime:
        return datetime(2026, 10, 25, self.hour, 30)


async def test_the_owners_word_comes_before_the_hours(tmp_path: Path) -> None:
    wall = Wall(12)
    switch = Switch(file=PauseFile(tmp_path), hours=parse_hours("22-07"), now=wall)
    assert (switch.why(), switch.words("hours")) == ("hours", "paused by --hours until 22:00")
    say_pause(tmp_path)
    assert switch.why() == "hand"
    assert "swarm resume" in switch.words("hand")
    wall.hour = 23
    assert switch.why() == "hand"
    say_resume(tmp_path)
    assert (switch.why(), switch.words("")) == ("", "")
    wall.hour = 9  # a clock that jumps
    assert switch.why() == "hours"
    wall.hour = 6
    assert switch.why() == ""
    assert Switch(file=PauseFile(tmp_path)).why() == ""


async def test_a_pauser_follows_word_and_clock(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pausing, "LOOK_SECONDS", 0.01)
    wall = Wall(23)
    pauser = Pauser(
        Withdrawal(parts.build()), Switch(file=PauseFile(tmp_path), hours=parse_hours("22-07"), now=wall), tmp_path
    )
    await pauser.begin()
    assert (pauser.why, pauser.words(), parts.did) == ("", "", [])
    assert is_hosting(tmp_path)
    task = asyncio.create_task(pauser.run())
    async with asyncio.timeout(30):
        say_pause(tmp_path)
        await parts.see("ended texts")
        assert parts.away == "hand"
        wall.hour = 12
        say_resume(tmp_path)
        await parts.see("announced hours")
        assert "caught up" not in parts.did, "one reason follows the other without a return"
        wall.hour = 22
        await parts.see("announced host")
        assert pauser.words() == ""
    task.cancel()
    pauser.close()
    assert not is_hosting(tmp_path)


async def test_a_host_that_is_paused_when_it_starts_is_never_announced(parts: Parts, tmp_path: Path) -> None:
    say_pause(tmp_path)
    pauser = Pauser(Withdrawal(parts.build()), Switch(file=PauseFile(tmp_path)), tmp_path)
    async with asyncio.timeout(30):
        await pauser.begin()
    pauser.close()
    assert parts.did[0] == "announced hand"
    assert "announced host" not in parts.did
