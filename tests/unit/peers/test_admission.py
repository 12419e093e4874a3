"""Who comes in when a cache is full: clients in turn, none starved, and nobody waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocks.errors import CacheFull
from peers.chains.admission import AdmissionLimits, Applicant, Cache, Held, gives_way, next_in, why_not_more
from peers.chains.admission_queue import Admission

LIMITS = AdmissionLimits(waiting=6, waiting_of_client=4, sessions_of_client=3, client_share=0.75, wait_seconds=60.0)


def one(ticket: int, client: str = "ann", num_bytes: int = 10) -> Applicant:
    return Applicant(ticket=ticket, client=client, num_bytes=num_bytes)


def cache(**held: tuple[int, int, int]) -> Cache:
    """100 bytes, and of each client: bytes, sessions, when it was let in."""
    return Cache(budget_bytes=100, held={c: Held(num_bytes=b, sessions=s, last=w) for c, (b, s, w) in held.items()})


def order(waiting: list[Applicant], held: Cache) -> list[int]:
    """The tickets in the order in which they are let in, if all fit."""
    tickets = []
    while (chosen := next_in(waiting, held, LIMITS)) is not None:
        tickets.append(chosen.ticket)
        waiting = [each for each in waiting if each != chosen]
        before = held.of(chosen.client)
        after = Held(num_bytes=before.num_bytes + chosen.num_bytes, sessions=before.sessions + 1, last=len(tickets))
        held = replace(held, held={**held.held, chosen.client: after})
    return tickets


def test_clients_take_turns_and_within_one_the_first_comes_first() -> None:
    assert order([one(1), one(2), one(3), one(4, "bob"), one(5, "bob"), one(6, "cem")], cache()) == [1, 4, 6, 2, 5, 3]


def test_who_holds_more_than_its_share_comes_after_who_does_not() -> None:
    held = cache(ann=(60, 2, 1), bob=(10, 1, 9))
    assert order([one(1, "ann"), one(2, "bob")], held) == [2, 1]
    assert order([one(1, "ann", 60), one(2, "bob", 60)], cache(bob=(1, 1, 0))) == [1, 2], "a first session always may"


def test_one_client_cannot_take_all() -> None:
    held = cache(ann=(70, 2, 1))
    assert next_in([one(1)], held, LIMITS) is None
    assert "75%" in (why_not_more(one(1), held, LIMITS) or "")
    assert next_in([one(1), one(2, "bob", 90)], held, LIMITS) == one(2, "bob", 90)
    assert why_not_more(one(1, num_bytes=100), cache(), LIMITS) is None
    assert "3 sessions" in (why_not_more(one(1, num_bytes=1), cache(ann=(3, 3, 1)), LIMITS) or "")


def test_a_full_queue_is_left_by_the_latest_of_those_who_crowd_it() -> None:
    crowd = [one(ticket) for ticket in (1, 2, 3, 4)]
    with pytest.raises(CacheFull, match="of this peer"):
        gives_way(one(9), crowd, LIMITS)
    assert gives_way(one(9, "bob"), crowd, LIMITS) is None
    full = [*crowd, one(5, "bob"), one(6, "cem")]
    assert gives_way(one(9, "dee"), full, LIMITS) == one(4)
    assert gives_way(one(9, "bob"), full, LIMITS) == one(4)
    even = [one(ticket, client) for ticket, client in enumerate("abcdef")]
    with pytest.raises(CacheFull, match="6 sessions wait"):
        gives_way(one(9, "a"), even, LIMITS)


@pytest.mark.parametrize(
    "wrong", [{"waiting": 0}, {"wait_seconds": -1.0}, {"client_share": 0.0}, {"client_share": 1.5}]
)
def test_limits_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="use"):
        AdmissionLimits(**wrong)  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 40)), max_size=14))
def test_nobody_is_overtaken_twice_by_the_same_client(drawn: list[tuple[str, int]]) -> None:
    """From an empty cache that always has room, while no client is at its cap."""
    waiting = [one(ticket, client, 1 + size // 40) for ticket, (client, size) in enumerate(drawn)]
    roomy = AdmissionLimits(sessions_of_client=99, client_share=1.0)
    come: list[Applicant] = []
    held: dict[str, Held] = {}
    while (chosen := next_in(waiting, Cache(budget_bytes=10_000, held=held), roomy)) is not None:
        came_since = [each.client for each in come]
        others = {each.client for each in waiting} - {chosen.client}
        come.append(chosen)
        for client in others:
            last = max((at for at, name in enumerate(came_since) if name == client), default=-1)
            assert came_since[last + 1 :].count(chosen.client) == 0, "a second turn before another's first"
        waiting.remove(chosen)
        before = held.get(chosen.client, Held())
        held[chosen.client] = Held(num_bytes=0, sessions=before.sessions + 1, last=len(come))
    assert not waiting


class Door:
    """An admission over a budget that sessions really fill."""

    def __init__(self, budget: int, limits: AdmissionLimits = LIMITS) -> None:
        self.admission, self.free, self.let_in = Admission(budget, limits), budget, list[str]()
        self.sizes: dict[str, int] = {}

    def opening(self, session: str, size: int) -> Callable[[], asyncio.Future[None]]:
        async def attempt() -> None:
            await asyncio.sleep(0)
            if size > self.free:
                raise CacheFull(f"{size} do not fit in {self.free}")
            self.free -= size
            self.sizes[session] = size
            self.let_in.append(session)

        return attempt  # type: ignore[return-value]

    def ask(self, session: str, client: str, size: int = 10, *, seconds: float = 60.0) -> asyncio.Task[None]:
        attempt = self.opening(session, size)
        return asyncio.create_task(self.admission.admit(session, client, size, attempt, seconds=seconds))

    def end(self, session: str) -> None:
        self.free += self.sizes.pop(session)
        self.admission.release(session)


async def settle() -> None:
    """Until nothing more happens without something from outside."""
    for _ in range(50):
        await asyncio.sleep(0)


async def test_while_there_is_room_all_come_in_at_once() -> None:
    door = Door(100, replace(LIMITS, waiting=9))
    await asyncio.gather(*(door.ask(f"{client}{i}", client, seconds=0) for client in "abc" for i in range(3)))
    assert door.let_in == ["a0", "a1", "a2", "b0", "b1", "b2", "c0", "c1", "c2"]
    assert door.admission.waiting == 0


async def test_without_patience_a_full_cache_refuses_at_once() -> None:
    door = Door(10)
    await door.ask("first", "a")
    with pytest.raises(CacheFull, match="do not fit"):
        await door.ask("second", "b", seconds=0)
    patient = door.ask("third", "c")
    await settle()
    with pytest.raises(CacheFull, match="wait for room"):
        await door.ask("fourth", "d", seconds=0)
    door.end("first")
    await patient


async def test_what_is_freed_while_one_tries_is_not_missed() -> None:
    door = Door(10)
    await door.ask("first", "a")
    tried = asyncio.Event()

    async def late() -> None:
        free = door.free
        if not tried.is_set():
            tried.set()
            await settle()  # the answer of the compute thread comes after the release
        if free < 10:
            raise CacheFull("full")

    second = asyncio.create_task(door.admission.admit("second", "b", 10, late, seconds=60.0))
    await tried.wait()
    door.end("first")
    await second


async def test_freed_room_goes_round_between_the_clients() -> None:
    door = Door(30)
    await asyncio.gather(door.ask("x0", "x"), door.ask("x1", "x"), door.ask("y0", "y"))
    waiting = [door.ask("x2", "x"), door.ask("x3", "x"), door.ask("z0", "z"), door.ask("w0", "w")]
    await settle()
    assert len(door.let_in) == 3
    for session in ("x0", "y0", "x1", "z0"):
        door.end(session)
        await settle()
    assert door.let_in[3:] == ["z0", "w0", "x2", "x3"]
    await asyncio.gather(*waiting)


async def test_a_large_session_is_not_passed_by_small_ones() -> None:
    door = Door(30)
    await asyncio.gather(*(door.ask(f"{client}0", client) for client in "abc"))
    large, small = door.ask("large", "d", 20), door.ask("small", "e", 10)
    await settle()
    for session in ("a0", "b0", "c0"):
        door.end(session)
        await settle()
    await asyncio.gather(large, small)
    assert door.let_in[3:] == ["large", "small"]


async def test_who_waits_too_long_is_told_why_and_leaves_the_queue() -> None:
    door = Door(10, replace(LIMITS, wait_seconds=0.01))
    await door.ask("first", "a")
    with pytest.raises(CacheFull, match=r"in 0\.01 s.*10 do not fit in 0"):
        await door.ask("second", "b")
    assert door.admission.waiting == 0
    door.end("first")
    await door.ask("third", "b")


async def test_a_flood_of_one_client_delays_only_itself() -> None:
    door = Door(40)
    await asyncio.gather(*(door.ask(f"m{i}", "mallory") for i in range(3)))
    flood = [door.ask(f"f{i}", "mallory") for i in range(20)]
    await settle()
    assert [task.done() for task in flood] == [False] * 4 + [True] * 16, "only so many of one client may wait"
    await door.ask("ann", "ann")
    others = [door.ask(name, name) for name in ("bob", "cem", "dee")]
    await settle()
    assert sum(task.done() for task in flood) == 17, "the latest of the flood gave way"
    for session in ("ann", "m0", "m1"):
        door.end(session)
        await settle()
    assert sorted(door.let_in[4:]) == ["bob", "cem", "dee"]
    for task in [*flood, *others]:
        task.cancel()
    assert {type(result) for result in await asyncio.gather(*flood, return_exceptions=True)} == {
        CacheFull,
        asyncio.CancelledError,
    }


async def test_who_gives_up_frees_the_turn_for_the_next() -> None:
    door = Door(10)
    held = asyncio.Event()

    async def slow() -> None:
        held.set()
        await asyncio.Event().wait()

    first = asyncio.create_task(door.admission.admit("slow", "a", 10, slow, seconds=60.0))
    await held.wait()
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await door.ask("next", "a")
    door.end("next")
    door.admission.release("never")
    await door.ask("last", "b")


async def test_a_session_that_is_released_while_it_opens_is_not_counted() -> None:
    door = Door(1000, replace(LIMITS, sessions_of_client=1))
    task = door.ask("gone", "a")
    await asyncio.sleep(0)
    door.admission.release("gone")
    await task
    await door.ask("next", "a")
