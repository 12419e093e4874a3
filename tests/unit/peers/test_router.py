"""The live router leaves out who fails or does not serve yet, and takes it back at its first sign of life."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import Any, cast

import pytest

from blocks.spans import Span
from peers.errors import BadMembership, PeerLost
from peers.network import PeerId
from peers.routes.router import LiveRouter, RouterConfig
from peers.routes.routing import Hop
from peers.streams.calls import Answer
from peers.streams.messages import AskInfo, InfoReply
from peers.streams.pool import Pool
from tests.fakes import RUN, FakeDirectory, fake_peer_id, peer_record

ANN, ME = fake_peer_id("ann"), fake_peer_id("me")
WHOLE = Span(0, 2)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class InfoPool:
    """Answers probes with `record`; None: nobody answers."""

    me = ME

    def __init__(self) -> None:
        self.record: bytes | None = b"record"
        self.asked = 0

    async def call(self, peer: PeerId, kind: str, message: object, tensors: Any = (), *, seconds: float) -> Answer:
        assert isinstance(message, AskInfo)
        self.asked += 1
        if self.record is None:
            raise PeerLost(f"peer {peer} is gone")
        return Answer(message=InfoReply(record=self.record, unix_seconds=0.0))


class Around:
    """A router that knows of one host."""

    def __init__(self) -> None:
        self.clock, self.pool = Clock(), InfoPool()
        self.directory = FakeDirectory(self.clock)
        config = RouterConfig(run=RUN, whole=WHOLE)
        self.over: Exception | None = None
        self.router = LiveRouter(
            self.directory,
            cast(Pool, self.pool),
            config,
            rng=random.Random(1),
            clock=self.clock,
            check=self.check,
        )

    def check(self) -> None:
        if self.over is not None:
            raise self.over

    def refresh(self) -> bool:
        """Whether the host may be used now."""
        asyncio.run(self.router.refresh())
        return self.router.health.is_usable(ANN)

    def announce(self, expires_at: float) -> None:
        asyncio.run(self.directory.publish(peer_record(ANN, WHOLE, expires_at=expires_at)))


def test_a_host_that_was_started_again_is_left_out_until_it_serves_its_blocks() -> None:
    around = Around()
    around.announce(1060.0)
    assert around.refresh()
    around.router.failed(ANN, "its stream ended")
    around.pool.record = b""  # it answers, and holds nothing yet; its record is of its life before
    around.clock.now += 2.0
    assert not around.refresh()
    around.pool.record = b"record"
    around.clock.now += 60.0
    around.announce(1120.0)
    assert around.refresh()


def test_who_announces_itself_anew_is_asked_at_once() -> None:
    around = Around()
    around.announce(1060.0)
    assert around.refresh()
    around.pool.record = None
    for _ in range(6):  # each probe that fails doubles the wait for the next
        around.clock.now += 3.0
        around.router.failed(ANN, "no answer")
    around.pool.record, asked = b"record", around.pool.asked
    assert not around.refresh(), "its turn has not come, and its record is the old one"
    assert around.pool.asked == asked
    around.announce(1070.0)
    assert around.refresh()
    assert around.pool.asked == asked + 1


@pytest.mark.parametrize("role", ["trainer", "holder", "keeper"])
def test_who_is_no_host_and_announces_itself_anew_is_asked_at_once_too(role: str) -> None:
    """Members of other loops, and holders behind NAT, take part in rounds."""
    around = Around()

    def announce(expires_at: float) -> None:
        record = replace(peer_record(ANN, WHOLE, expires_at=expires_at), roles=(role,))
        asyncio.run(around.directory.publish(record))

    announce(1060.0)
    around.refresh()
    around.pool.record = None
    for _ in range(6):
        around.clock.now += 600.0
        around.router.failed(ANN, "no answer")
    around.pool.record = b"record"
    assert not around.refresh()
    announce(around.clock.now + 1060.0)
    assert around.refresh()


def test_one_announcement_is_one_probe_more() -> None:
    around = Around()
    around.announce(1060.0)
    assert around.refresh()
    around.pool.record = None
    for _ in range(6):
        around.router.failed(ANN, "no answer")
    around.announce(1070.0)
    asked = around.pool.asked
    assert not around.refresh()
    assert not around.refresh()
    assert around.pool.asked == asked + 1


def test_blocks_that_a_peer_behind_nat_holds_are_for_itself_alone() -> None:
    around = Around()
    for peer in (ANN, ME):
        asyncio.run(around.directory.publish(replace(peer_record(peer, WHOLE), roles=("holder",))))
    around.refresh()
    assert [record.peer for record in around.router.records] == [ME]
    assert asyncio.run(around.router.fast(WHOLE)) == (Hop(peer=ME, span=WHOLE),)
    assert around.pool.asked == 0


def refused_by_one_that_moves() -> Around:
    """The host that is known has other plans than its record in the directory says, and tells so when asked."""
    around = Around()
    around.announce(1060.0)
    assert around.refresh()
    around.directory.handed[b"moving"] = replace(peer_record(ANN, WHOLE, expires_at=1065.0), roles=())
    around.pool.record = b"moving"
    asyncio.run(around.router.refused(Hop(peer=ANN, span=WHOLE), "these blocks are not held here"))
    return around


def test_a_host_that_refuses_what_it_has_left_is_not_failed_and_offers_nothing_until_it_says_so() -> None:
    around = refused_by_one_that_moves()
    assert around.router.health.is_usable(ANN), "its word is as good as before"
    assert not around.router.records
    assert around.refresh()
    assert not around.router.records, "the directory still has the older record"
    around.announce(1070.0)
    assert around.refresh()
    assert [record.expires_at for record in around.router.records] == [1070.0]


def test_a_host_that_refuses_and_offers_the_same_blocks_still_has_failed() -> None:
    around = Around()
    around.announce(1060.0)
    assert around.refresh()
    around.directory.handed[b"record"] = peer_record(ANN, WHOLE, expires_at=1065.0)
    asyncio.run(around.router.refused(Hop(peer=ANN, span=WHOLE), "busy"))
    assert around.router.health.unusable() == {ANN: "busy"}


def test_who_cannot_be_asked_after_a_refusal_has_failed_once() -> None:
    around = Around()
    around.announce(1060.0)
    assert around.refresh()
    around.pool.record = None
    asyncio.run(around.router.refused(Hop(peer=ANN, span=WHOLE), "busy"))
    assert around.router.health.of(ANN).failures == 1


def test_what_a_host_told_is_not_kept_where_the_directory_stays_with_another_record() -> None:
    around = refused_by_one_that_moves()
    around.clock.now += 11.0
    assert around.refresh()
    assert [record.expires_at for record in around.router.records] == [1060.0]


def test_who_can_never_find_a_route_does_not_wait_for_one() -> None:
    around = Around()
    around.over = BadMembership("this peer's membership is over")
    with pytest.raises(BadMembership):
        asyncio.run(around.router.fast(WHOLE))
    around.announce(1060.0)
    around.refresh()
    assert asyncio.run(around.router.fast(WHOLE)), "where there is one, nobody asks"
