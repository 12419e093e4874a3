"""Training, units and info services: who may say what, and what a stream leaves behind when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import pytest
import torch

from blocks.adapters import unit_digest
from blocks.ledger import Ledger, MicrobatchId, Piece
from blocks.snapshots import Snapshot, SnapshotShelf
from blocks.spans import Span, UnitId
from blocks.training import Microbatch
from blocks.unit_state import UnitState
from peers.answering import CallServer
from peers.calls import Answer, Question, hello_maker
from peers.edge import Edge
from peers.errors import BadMessage, PeerLost, Refused
from peers.info_service import InfoService
from peers.messages import AskInfo, Backward, Commit, Drop, Evaluate, Forward, InfoReply, Message
from peers.network import PeerId
from peers.pool import Pool
from peers.traffic import Traffic
from peers.train_service import TrainService
from peers.unit_client import fetch_newest, fetch_unit
from peers.units_service import UnitsService
from tests.fakes_network import fake_swarm

HELLO = hello_maker("run-1", "swarmtune 1")
HELD = Span(2, 4)
HIDDEN = torch.ones(2, 3, 8)
UNIT = UnitId("default/block.2")


class FakeTrainer:
    """A SpanTrainer's books without a model."""

    def __init__(self) -> None:
        self.ledger = Ledger(HELD, batch_size=100)

    async def forward(self, one: Microbatch) -> torch.Tensor:
        self.ledger.open(one.piece, samples=one.samples, deadline=1.0)
        return one.hidden_BTD

    async def backward(self, piece: Piece, grad: torch.Tensor, *, tokens: int) -> torch.Tensor:
        self.ledger.answer(piece, tokens=tokens, deadline=1.0)
        return grad

    async def commit(self, piece: Piece) -> None:
        self.ledger.commit(piece)

    def drop(self, microbatch: MicrobatchId) -> None:
        for piece in self.ledger.pieces_of(microbatch):
            self.ledger.drop(piece)

    async def evaluate(self, hidden: torch.Tensor, mask: object, span: Span, label: str) -> torch.Tensor:
        return hidden


@dataclass
class Train:
    service: TrainService
    ledger: Ledger

    async def ask(self, message: Message, *tensors: torch.Tensor, stream: int = 1) -> Answer:
        question = Question(peer=PeerId("ann"), stream=stream, message=message, tensors=tensors)
        return await self.service.answer(question)


@pytest.fixture
def train() -> Train:
    trainer, shelf = FakeTrainer(), SnapshotShelf()
    shelf.add(Snapshot(label="s", round=1, digests={}))
    service = TrainService(trainer, shelf, Edge(hidden_size=8, max_positions=16))  # type: ignore[arg-type]
    return Train(service=service, ledger=trainer.ledger)


def of(step: int, trainer: str = "ann") -> MicrobatchId:
    return MicrobatchId(trainer, 1, step, 0)


async def test_a_microbatch_goes_through_and_counts(train: Train) -> None:
    await train.ask(Forward(microbatch=of(0), span=HELD, samples=2), HIDDEN, torch.ones(2, 3, dtype=torch.uint8))
    await train.ask(Backward(microbatch=of(0), span=HELD, tokens=6), HIDDEN)
    await train.ask(Commit(microbatch=of(0), span=HELD))
    assert train.ledger.tallies[2].tokens == 6
    assert (await train.ask(Evaluate(span=HELD), HIDDEN)).tensors[0].shape == HIDDEN.shape


@pytest.mark.parametrize(
    ("message", "tensors"),
    [
        (Forward(microbatch=of(0, "bob"), span=HELD, samples=2), [HIDDEN]),
        (Backward(microbatch=of(0, "bob"), span=HELD, tokens=1), [HIDDEN]),
        (Commit(microbatch=of(0, "bob"), span=HELD), []),
        (Drop(microbatch=of(0, "bob")), []),
        (Forward(microbatch=of(0), span=HELD, samples=3), [HIDDEN]),
        (Forward(microbatch=of(0), span=Span(1, 3), samples=2), [HIDDEN]),
        (Forward(microbatch=of(0), span=HELD, samples=2), []),
        (Forward(microbatch=of(0), span=HELD, samples=2), [HIDDEN[0]]),
        (Forward(microbatch=of(0), span=HELD, samples=2), [HIDDEN.long()]),
        (Forward(microbatch=of(0), span=HELD, samples=2), [torch.ones(2, 17, 8)]),
        (Forward(microbatch=of(0), span=HELD, samples=2), [torch.ones(2, 0, 8)]),
        (Forward(microbatch=of(0), span=HELD, samples=2), [HIDDEN, torch.full((2, 3), 2)]),
        (Forward(microbatch=of(0), span=HELD, samples=2), [HIDDEN, torch.ones(2, 3)]),
        (Backward(microbatch=of(0), span=HELD, tokens=7), [HIDDEN]),
        (AskInfo(), []),
    ],
)
async def test_what_is_not_right_is_refused(train: Train, message: Message, tensors: list[torch.Tensor]) -> None:
    with pytest.raises((BadMessage, Refused)):
        await train.ask(message, *tensors)
    assert not train.ledger.pieces()


async def test_a_closed_stream_drops_its_own_microbatches_only(train: Train) -> None:
    for step, stream in ((0, 1), (1, 1), (2, 2)):
        await train.ask(Forward(microbatch=of(step), span=HELD, samples=2), HIDDEN, stream=stream)
    await train.ask(Forward(microbatch=of(1), span=HELD, samples=2), HIDDEN, stream=2)  # sent again after a reconnect
    await train.service.stream_closed(PeerId("ann"), 1)
    assert [piece.microbatch.step for piece in train.ledger.pieces()] == [1, 2]


async def test_what_is_kept_per_microbatch_is_forgotten_with_it(train: Train) -> None:
    for step in range(1300):
        await train.ask(Forward(microbatch=of(step), span=HELD, samples=2), HIDDEN)
        await train.ask(Drop(microbatch=of(step)))
    assert len(train.service._stream_of) <= 1024


def state(number: int = 3, **changes: object) -> UnitState:
    tensors = {"a.A": torch.full((2, 3), float(number)), "a.B": torch.ones(3, 2)}
    plain = UnitState(
        unit=UNIT, round=number, weight=4.0, total_samples=9, digest=unit_digest(tensors), tensors=tensors,
        moments={"a.A/exp_avg": torch.zeros(2, 3)},
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]


class Holder:
    def __init__(self, held: UnitState) -> None:
        self.held = held

    async def read_unit(self, unit: UnitId, *, moments: bool) -> UnitState | None:
        return (self.held if moments else replace(self.held, moments={})) if unit == UNIT else None


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    wrong = state(9, digest=bytes(32))
    async with asyncio.timeout(20), fake_swarm() as swarm:
        for name, held in (("old", state(2)), ("new", state(5)), ("liar", wrong)):
            server = CallServer(HELLO, UnitsService(Holder(held)), Traffic())
            await swarm.join(name).serve_stream("units", server.serve)
        await swarm.find(PeerId("new")).serve_stream(
            "info", CallServer(HELLO, InfoService(lambda: b"record", Traffic(), lambda: 7.0), Traffic()).serve
        )
        pool = Pool(swarm.join("ann"), HELLO, Traffic(), {})
        yield pool
        await pool.close()


async def test_a_unit_arrives_with_its_moments_and_the_newest_wins(pool: Pool) -> None:
    peers = [PeerId(name) for name in ("old", "liar", "gone", "new")]
    got = await fetch_newest(pool, peers, UNIT, moments=True, digest=unit_digest, seconds=5)
    assert got is not None
    assert got.version == state(5).version
    assert torch.equal(got.tensors["a.A"], state(5).tensors["a.A"])
    assert got.moments.keys() == {"a.A/exp_avg"}
    bare = await fetch_unit(pool, PeerId("old"), UNIT, moments=False, digest=unit_digest, seconds=5)
    assert bare.moments == {}


async def test_a_unit_whose_digest_does_not_match_is_refused(pool: Pool) -> None:
    with pytest.raises(PeerLost, match="digest"):
        await fetch_unit(pool, PeerId("liar"), UNIT, moments=False, digest=unit_digest, seconds=5)
    other = UnitId("default/block.9")
    with pytest.raises(Refused, match="not held"):
        await fetch_unit(pool, PeerId("new"), other, moments=False, digest=unit_digest, seconds=5)
    lost = [PeerId("liar"), PeerId("gone")]
    assert await fetch_newest(pool, lost, UNIT, moments=False, digest=unit_digest, seconds=5) is None


async def test_info_says_what_a_peer_holds(pool: Pool) -> None:
    answer = await pool.call(PeerId("new"), "info", AskInfo(), seconds=5)
    assert answer.message == InfoReply(record=b"record", unix_seconds=7.0)
