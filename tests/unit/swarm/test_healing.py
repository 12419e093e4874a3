"""When a host moves: when it is the one, once its promise was seen, and not when others were there first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from blocks.spans import Span
from peers.errors import NetworkFailed
from peers.network import PeerId
from peers.placing.moving import MovingRules
from peers.records import PeerRecord
from peers.routes.health import Health
from swarm.hosts.healing import Healer, HealerConfig, sole_holders
from tests.fakes import peer_record

ANN, BOB, CAT = PeerId("ann"), PeerId("bob"), PeerId("cat")
FRONT, BACK = Span(0, 3), Span(3, 6)
NOW = 1000.0


def host(peer: PeerId, span: Span, **changes: object) -> PeerRecord:
    record = replace(peer_record(peer, span), capacity=3, since=1.0, roles=("host",))
    return replace(record, **changes)  # type: ignore[arg-type]


@dataclass
class FakeRouter:
    """What a router has seen; `later` is what it sees once it looks again."""

    found: tuple[PeerRecord, ...]
    later: tuple[PeerRecord, ...] | None = None
    gone: frozenset[PeerId] = frozenset()
    health: Health = field(default_factory=lambda: Health(lambda: 0.0))
    checked: list[PeerId] = field(default_factory=list)

    async def check(self, peers: list[PeerId]) -> None:
        self.checked += peers
        for peer in self.gone.intersection(peers):
            self.health.failed(peer, "no answer")

    async def is_there(self, peer: PeerId) -> bool:
        return peer not in self.gone

    async def refresh(self) -> None:
        self.found = self.later or self.found


@dataclass
class FakeMover:
    """A host that notes what it is asked to do."""

    fits: bool = True
    is_away: bool = False
    is_deaf: bool = False
    promised: list[Span | None] = field(default_factory=list)
    moved: list[Span] = field(default_factory=list)
    at_once: list[bool] = field(default_factory=list)

    async def promise(self, span: Span | None) -> None:
        if self.is_deaf:
            raise NetworkFailed("p2pd is gone")
        self.promised.append(span)

    async def move(self, span: Span, *, to_a_gap: bool = False) -> bool:
        self.moved.append(span)
        self.at_once.append(to_a_gap)
        return self.fits


def with_promise(found: tuple[PeerRecord, ...], me: PeerId, span: Span) -> tuple[PeerRecord, ...]:
    return tuple(replace(each, moves_to=span, since=NOW, moved=True) if each.peer == me else each for each in found)


def healer_of(
    router: FakeRouter, mover: FakeMover, me: PeerId = ANN, clock: Callable[[], float] = lambda: 0.0
) -> Healer:
    rules = MovingRules(settle_seconds=0.0, stand_seconds=1e9)  # nobody moves for balance
    config = HealerConfig(me=me, num_blocks=6, rules=rules, look_seconds=0.001)
    return Healer(mover, router, lambda: NOW, config, is_there=router.is_there, clock=clock)  # type: ignore[arg-type]


async def looks(router: FakeRouter, mover: FakeMover, times: int = 1, me: PeerId = ANN) -> None:
    healer = healer_of(router, mover, me)
    for _ in range(times):
        await healer._look()


TWO_AND_ONE = (host(ANN, FRONT), host(BOB, FRONT), host(CAT, BACK))


async def mover_of(found: tuple[PeerRecord, ...], gone: frozenset[PeerId]) -> PeerId:
    """Who of ann and bob is elected when `gone` is found out."""
    for me in (ANN, BOB):
        mover = FakeMover()
        await looks(FakeRouter(found, with_promise(found, me, BACK), gone), mover, me=me)
        if mover.promised:
            return me
    raise AssertionError("nobody was elected")


async def test_when_the_last_holder_is_gone_one_host_promises_and_moves_and_the_other_stays() -> None:
    gone = frozenset({CAT})
    elected = await mover_of(TWO_AND_ONE, gone)
    other = BOB if elected == ANN else ANN
    mover, router = FakeMover(), FakeRouter(TWO_AND_ONE, with_promise(TWO_AND_ONE, elected, BACK), gone)
    await looks(router, mover, me=elected)
    assert mover.promised == mover.moved == [BACK]
    assert mover.at_once == [True], "nothing that is in flight can end before"
    assert CAT in router.checked
    still = FakeMover()
    await looks(FakeRouter(TWO_AND_ONE, None, gone), still, times=3, me=other)
    assert not still.promised


async def test_nobody_moves_while_all_blocks_are_held() -> None:
    mover = FakeMover()
    await looks(FakeRouter(TWO_AND_ONE), mover, times=3)
    assert not mover.promised


async def test_a_promise_is_withdrawn_when_somebody_else_was_there_first() -> None:
    gone = frozenset({CAT})
    elected = await mover_of(TWO_AND_ONE, gone)
    dee = host(PeerId("dee"), BACK)
    mover = FakeMover()
    later = (*with_promise(TWO_AND_ONE, elected, BACK), dee)
    await looks(FakeRouter(TWO_AND_ONE, later, gone), mover, me=elected)
    assert mover.promised == [BACK, None]
    assert not mover.moved


async def test_blocks_that_a_newcomer_is_loading_are_left_to_it_though_it_does_not_answer_yet() -> None:
    loading = host(PeerId("dee"), BACK, roles=(), moves_to=BACK, since=NOW - 1)
    for me in (ANN, BOB):
        mover, router = FakeMover(), FakeRouter((*TWO_AND_ONE, loading), None, frozenset({CAT}))
        router.health.failed(loading.peer, "does not serve its blocks yet")
        await looks(router, mover, times=2, me=me)
        assert BACK not in mover.promised
        assert not mover.moved


async def test_a_promise_does_not_outlive_who_gave_it() -> None:
    """The last holder is gone, and so is who was loading its blocks: nobody waits for the record to expire."""
    dee = PeerId("dee")
    found = (*TWO_AND_ONE, host(dee, BACK, roles=(), moves_to=BACK, since=NOW - 1))
    gone = frozenset({CAT, dee})
    elected = await mover_of(TWO_AND_ONE, frozenset({CAT}))
    mover = FakeMover()
    router = FakeRouter(found, with_promise(found, elected, BACK), frozenset({CAT}))
    healer = healer_of(router, mover, elected)
    await healer._look()
    router.gone = gone
    await healer._look()
    assert not mover.promised, "one look is not enough: who loads may be too busy to answer"
    await healer._look()
    assert mover.promised == mover.moved == [BACK]


async def test_a_loader_that_answers_again_counts_again() -> None:
    dee = PeerId("dee")
    router = FakeRouter((*TWO_AND_ONE, host(dee, BACK, roles=(), moves_to=BACK, since=NOW - 1)), None, frozenset({CAT}))
    for me in (ANN, BOB):
        mover = FakeMover()
        healer = healer_of(router, mover, me)
        for gone in ({dee}, set(), {dee}, set()):
            router.gone = frozenset({CAT, *gone})
            await healer._look()
        assert not mover.promised


async def test_hosts_that_promised_are_asked_whether_they_are_there_though_others_hold_their_blocks() -> None:
    dee = host(PeerId("dee"), FRONT)
    found = (host(ANN, FRONT), host(BOB, FRONT, moves_to=BACK, since=NOW), host(CAT, BACK), dee)
    moved = []
    for me in (ANN, dee.peer):
        router, mover = FakeRouter(found, with_promise(found, me, BACK), frozenset({CAT, BOB})), FakeMover()
        await looks(router, mover, me=me)
        assert BOB in router.checked
        moved += mover.moved
    assert moved == [BACK], "bob's promise counted, though bob is gone"


async def test_a_clock_that_is_set_back_does_not_prolong_a_turn() -> None:
    gone = frozenset({CAT})
    elected = await mover_of(TWO_AND_ONE, gone)
    other = BOB if elected == ANN else ANN
    seconds = iter([0.0, 10.0, 21.0, 22.0])
    router, mover = FakeRouter(TWO_AND_ONE, with_promise(TWO_AND_ONE, other, BACK), gone), FakeMover()
    healer = healer_of(router, mover, other, clock=lambda: next(seconds))
    healer._now = lambda: NOW - 3600.0 * len(router.checked)
    for _ in range(4):
        await healer._look()
    assert mover.promised[:1] == [BACK], "who was elected let its turn go by"


@pytest.mark.parametrize("mover", [FakeMover(fits=False), FakeMover(is_deaf=True)], ids=["no room", "deaf"])
async def test_a_move_that_cannot_be_made_ends_nothing(mover: FakeMover) -> None:
    gone = frozenset({CAT})
    elected = await mover_of(TWO_AND_ONE, gone)
    await looks(FakeRouter(TWO_AND_ONE, with_promise(TWO_AND_ONE, elected, BACK), gone), mover, times=2, me=elected)
    assert len(mover.moved) == (0 if mover.is_deaf else 1)  # and what did not fit is not tried again and again


async def test_a_host_that_is_away_looks_at_nothing() -> None:
    router, mover = FakeRouter(TWO_AND_ONE, None, frozenset({CAT})), FakeMover(is_away=True)
    task = asyncio.create_task(healer_of(router, mover).run())
    await asyncio.sleep(0.05)
    task.cancel()
    assert not router.checked
    assert not mover.promised


def test_sole_holders_are_the_others_without_whom_a_block_would_be_gone() -> None:
    records = [host(ANN, Span(0, 2)), host(BOB, Span(1, 4)), host(CAT, Span(2, 4)), host(PeerId("dee"), Span(4, 6))]
    assert sole_holders(records, 6, me=BOB) == [ANN, "dee"]
    assert sole_holders(records, 6, me=ANN) == ["dee"]
    assert sole_holders(records, 4, me=BOB) == [ANN]  # blocks that the model has not are nobody's
    assert sole_holders([replace(record, roles=()) for record in records], 6, me=BOB) == []
