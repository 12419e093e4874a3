"""Units of published adapters between peers: believed by their digest, whoever sends them, and else not at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace

import pytest
import torch

from blocks.adapters import check_unit, unit_digest
from blocks.spans import UnitId
from blocks.unit_state import UnitState
from peers.errors import BadMessage, BadRecord, Refused
from peers.network import PeerId
from peers.published.catalogue import Published
from peers.published.client import SharedFetching, fetch_content, fetch_shared
from peers.published.content import check_bare, content_named, content_of, read_content, shared_unit
from peers.published.service import SharedUnits
from peers.streams.answering import CallServer
from peers.streams.calls import Question, hello_maker
from peers.streams.messages import MAX_CONTENT_BYTES, AskContent, FetchUnit, OfferUnits, RefusalCode
from peers.streams.pool import Pool
from peers.streams.traffic import Traffic
from tests.errors_page import met
from tests.fakes_network import FakeSwarm, fake_swarm

HELLO = hello_maker("run-1", "swarmtune 1")
BLOCKS = (1, 2, 4)
SHAPES = {"q_proj.lora_A": (2, 3), "q_proj.lora_B": (3, 2)}
ANN, BOB, EVE = PeerId("ann"), PeerId("bob"), PeerId("eve")


def tensors(block: int) -> dict[str, torch.Tensor]:
    return {name: torch.full(shape, float(block)) for name, shape in SHAPES.items()}


DIGESTS = {block: unit_digest(tensors(block)) for block in BLOCKS}
CONTENT, LISTED = content_of(DIGESTS)
ADAPTER = Published(name="pirate", content=CONTENT, num_bytes=144)


def state(block: int, named: Mapping[str, torch.Tensor] | None = None) -> UnitState:
    found = dict(named or tensors(block))
    unit = shared_unit(CONTENT, block)
    return UnitState(unit=unit, round=0, weight=0.0, total_samples=0, digest=unit_digest(found), tensors=found)


@dataclass
class Shelf:
    """A SharedSource; `asked` are the units that somebody wanted."""

    listed: bytes = LISTED
    units: dict[int, UnitState] = field(default_factory=lambda: {block: state(block) for block in BLOCKS})
    asked: list[int] = field(default_factory=list)

    def content(self, content: bytes) -> bytes | None:
        return self.listed if content == CONTENT else None

    async def read_unit(self, unit: UnitId, *, moments: bool) -> UnitState | None:
        named = content_named(unit)
        assert named is not None
        self.asked.append(named[1])
        return self.units.get(named[1])


def check(block: int, found: UnitState) -> None:
    check_unit(found.unit, found.tensors, SHAPES)


FETCHING = SharedFetching(blocks=BLOCKS, digest=unit_digest, check=check, seconds=5.0)


@pytest.fixture
async def network() -> AsyncIterator[FakeSwarm]:
    async with asyncio.timeout(30), fake_swarm() as network:
        yield network


async def serve(network: FakeSwarm, peer: PeerId, shelf: Shelf) -> Shelf:
    await network.join(peer).serve_stream("units", CallServer(HELLO, SharedUnits(shelf), Traffic()).serve)
    return shelf


@pytest.fixture
async def pool(network: FakeSwarm) -> AsyncIterator[Pool]:
    pool = Pool(network.join("me"), HELLO, Traffic(), {})
    yield pool
    await pool.close()


async def fetch(pool: Pool, *peers: PeerId) -> dict[int, UnitState] | None:
    """All units, or None."""
    fetching, found = replace(FETCHING, lost=set()), {}
    for block in BLOCKS:
        state = await fetch_shared(pool, peers, shared_unit(CONTENT, block), LISTED, fetching)
        if state is None:
            return None
        found[block] = state
    return found


def test_a_list_of_digests_names_each_unit_and_is_named_by_its_own() -> None:
    assert read_content(LISTED, CONTENT, BLOCKS) == DIGESTS
    assert content_named(shared_unit(CONTENT, 4)) == (CONTENT, 4)
    assert content_named(UnitId("default/block.4")) is None
    assert content_named(UnitId(f"{'x' * 64}/block.4")) is None
    with pytest.raises(BadRecord, match="another digest"):
        read_content(LISTED[:-1] + b"!", CONTENT, BLOCKS)
    with pytest.raises(BadRecord, match="not of the run's 2 units"):
        read_content(LISTED, CONTENT, BLOCKS[:2])


def test_more_blocks_than_a_frame_has_room_for_are_refused() -> None:
    with pytest.raises(BadRecord) as refused:
        content_of({block: bytes(32) for block in range(MAX_CONTENT_BYTES // 32 + 1)})
    met("blocks cannot be published", refused.value)


@pytest.mark.parametrize("odd", [{"round": 1}, {"total_samples": 5}, {"moments": {"x": torch.ones(1)}}])
def test_a_unit_that_is_trained_is_no_finished_one(odd: dict[str, object]) -> None:
    check_bare(state(1))
    with pytest.raises(BadRecord, match="not of a finished one"):
        check_bare(replace(state(1), **odd))  # type: ignore[arg-type]


async def test_an_adapter_comes_whole_from_whoever_has_it(network: FakeSwarm, pool: Pool) -> None:
    await serve(network, ANN, Shelf())
    assert await fetch_content(pool, [ANN], ADAPTER, FETCHING) == LISTED
    found = await fetch(pool, ANN)
    assert found is not None
    assert {block: unit_digest(found[block].tensors) for block in BLOCKS} == DIGESTS


async def test_a_list_that_lies_is_passed_over(network: FakeSwarm, pool: Pool) -> None:
    await serve(network, EVE, Shelf(listed=bytes(len(LISTED))))
    await serve(network, ANN, Shelf())
    assert await fetch_content(pool, [EVE], ADAPTER, FETCHING) is None
    assert await fetch_content(pool, [EVE, ANN], ADAPTER, FETCHING) == LISTED


@pytest.mark.parametrize(
    "lie",
    [
        state(2, tensors(1)),
        state(2, {name: torch.full(shape, float("nan")) for name, shape in SHAPES.items()}),
        state(2, {name: torch.zeros(1000, 1000) for name in SHAPES}),
        replace(state(2), digest=b"x" * 32),
        replace(state(2), moments={"q_proj.lora_A/step": torch.ones(1)}),
        replace(state(2), round=3),
    ],
)
async def test_a_unit_that_lies_is_taken_from_another_and_its_sender_is_not_asked_again(
    network: FakeSwarm, pool: Pool, lie: UnitState
) -> None:
    shelf = await serve(network, EVE, Shelf(units={1: state(1), 2: lie, 4: state(4)}))
    assert await fetch(pool, EVE) is None
    assert shelf.asked == [1, 2]
    await serve(network, ANN, Shelf())
    found = await fetch(pool, EVE, ANN)
    assert found is not None
    assert {block: unit_digest(found[block].tensors) for block in BLOCKS} == DIGESTS
    assert 4 not in shelf.asked


async def test_what_is_lacking_everywhere_is_said_and_nothing_is_half_there(network: FakeSwarm, pool: Pool) -> None:
    await serve(network, ANN, Shelf(units={1: state(1)}))
    await serve(network, BOB, Shelf(units={2: state(2)}))
    assert await fetch(pool, ANN, BOB) is None


async def test_who_publishes_answers_for_that_and_nothing_else() -> None:
    service = SharedUnits(Shelf(units={}))

    def question(message: AskContent | FetchUnit | OfferUnits) -> Question:
        return Question(peer=BOB, stream=1, message=message, tensors=())

    with pytest.raises(Refused) as refused:
        await service.answer(question(AskContent(content=b"x" * 32)))
    assert refused.value.code == RefusalCode.ADAPTER
    with pytest.raises(Refused):
        await service.answer(question(FetchUnit(unit=shared_unit(CONTENT, 1))))
    with pytest.raises(BadMessage):
        await service.answer(question(OfferUnits(offers=())))
