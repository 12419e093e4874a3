"""Units and info services: what they give out, and what a reader believes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest
import torch

from blocks.adapters import unit_digest
from blocks.spans import Span, UnitId
from blocks.unit_state import UnitState
from peers.errors import PeerLost, Refused
from peers.info_service import InfoService
from peers.network import PeerId
from peers.streams.answering import CallServer
from peers.streams.calls import hello_maker
from peers.streams.messages import AskInfo, InfoReply, Wanted
from peers.streams.pool import Pool
from peers.streams.traffic import Traffic
from peers.streams.values import Offer
from peers.units.client import Fetching, fetch_newest, fetch_unit
from peers.units.service import UnitsService
from tests.fakes_network import fake_swarm

HELLO = hello_maker("run-1", "swarmtune 1")
HELD = Span(2, 4)
HIDDEN = torch.ones(2, 3, 8)
UNIT = UnitId("default/block.2")


def state(number: int = 3, **changes: object) -> UnitState:
    tensors = {"a.A": torch.full((2, 3), float(number)), "a.B": torch.ones(3, 2)}
    plain = UnitState(
        unit=UNIT, round=number, weight=4.0, total_samples=9, digest=unit_digest(tensors), tensors=tensors,
        moments={"a.A/exp_avg": torch.zeros(2, 3)},
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]


def fetching(**changes: object) -> Fetching:
    return replace(Fetching(digest=unit_digest, seconds=5), **changes)  # type: ignore[arg-type]


class Holder:
    def __init__(self, held: UnitState) -> None:
        self.held = held

    async def read_unit(self, unit: UnitId, *, moments: bool) -> UnitState | None:
        return (self.held if moments else replace(self.held, moments={})) if unit == UNIT else None


class Nothing:
    """A keeper that keeps nothing and takes nothing."""

    async def read_unit(self, unit: UnitId, *, moments: bool) -> UnitState | None:
        return None

    def look_at(self, peer: PeerId, offers: Sequence[Offer]) -> Wanted:
        raise Refused("nothing is taken here")

    async def keep(self, peer: PeerId, state: UnitState) -> None:
        raise Refused("nothing is taken here")


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    wrong = state(9, digest=bytes(32))
    async with asyncio.timeout(20), fake_swarm() as swarm:
        for name, held in (("old", state(2)), ("new", state(5)), ("liar", wrong)):
            server = CallServer(HELLO, UnitsService(Holder(held), Nothing(), unit_digest), Traffic())
            await swarm.join(name).serve_stream("units", server.serve)
        await swarm.find(PeerId("new")).serve_stream(
            "info", CallServer(HELLO, InfoService(lambda: b"record", Traffic(), lambda: 7.0), Traffic()).serve
        )
        pool = Pool(swarm.join("ann"), HELLO, Traffic(), {})
        yield pool
        await pool.close()


async def test_a_unit_arrives_with_its_moments_and_the_newest_wins(pool: Pool) -> None:
    peers = [PeerId(name) for name in ("old", "liar", "gone", "new")]
    got = await fetch_newest(pool, peers, UNIT, fetching(moments=True))
    assert got is not None
    assert got.version == state(5).version
    assert torch.equal(got.tensors["a.A"], state(5).tensors["a.A"])
    assert got.moments.keys() == {"a.A/exp_avg"}
    bare = await fetch_unit(pool, PeerId("old"), UNIT, fetching())
    assert bare.moments == {}


async def test_a_unit_whose_digest_does_not_match_is_refused(pool: Pool) -> None:
    with pytest.raises(PeerLost, match="digest"):
        await fetch_unit(pool, PeerId("liar"), UNIT, fetching())
    other = UnitId("default/block.9")
    with pytest.raises(Refused, match="not held"):
        await fetch_unit(pool, PeerId("new"), other, fetching())
    lost = [PeerId("liar"), PeerId("gone")]
    assert await fetch_newest(pool, lost, UNIT, fetching()) is None


async def test_info_says_what_a_peer_holds(pool: Pool) -> None:
    answer = await pool.call(PeerId("new"), "info", AskInfo(), seconds=5)
    assert answer.message == InfoReply(record=b"record", unix_seconds=7.0)
