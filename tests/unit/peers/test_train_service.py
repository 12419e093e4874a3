"""The training service: who may send what over whose lane, and what a stream leaves behind when it ends."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
import torch

from blocks.snapshots import Snapshot, SnapshotShelf
from blocks.spans import Span
from blocks.training.ledger import Ledger, MicrobatchId, Piece
from blocks.training.span_trainer import Microbatch
from peers.chains.edge import Edge
from peers.chains.lanes import MAX_LANES_PER_OWNER
from peers.chains.train_service import TrainService, item_of
from peers.errors import BadMessage, Refused
from peers.network import PeerId
from peers.streams.calls import Answer, Question
from peers.streams.messages import (
    AskInfo,
    Backward,
    Broken,
    Collect,
    Commit,
    Drop,
    Evaluate,
    Forward,
    Message,
    OpenLane,
)
from peers.streams.values import Place
from tests.fakes_network import Nobody

HELD = Span(2, 4)
LANE = OpenLane(lane="l", span=HELD)
HIDDEN = torch.ones(2, 3, 8)


class FakeTrainer:
    """A SpanTrainer's books without a model."""

    def __init__(self) -> None:
        self.ledger = Ledger(HELD, batch_size=100)
        self.evaluated: list[str] = []
        self.began, self.may_evaluate = asyncio.Event(), asyncio.Event()
        self.may_evaluate.set()

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
        self.evaluated.append(label)
        self.began.set()
        await self.may_evaluate.wait()
        return hidden


@dataclass
class Train:
    service: TrainService
    ledger: Ledger
    trainer: FakeTrainer
    shelf: SnapshotShelf
    dropped: list[str]

    async def ask(self, message: Message, *tensors: torch.Tensor, stream: int = 1, peer: str = "ann") -> Answer:
        question = Question(peer=PeerId(peer), stream=stream, message=message, tensors=tensors)
        return await self.service.answer(question)


@pytest.fixture
def train() -> Train:
    trainer, shelf = FakeTrainer(), SnapshotShelf()
    shelf.add(Snapshot(label="s", round=1, digests={}))
    dropped: list[str] = []

    def drop(gone: list[Snapshot]) -> None:
        dropped.extend(snapshot.label for snapshot in gone)

    edge = Edge(hidden_size=8, max_positions=16)
    service = TrainService(trainer, shelf, edge, Nobody(), drop)  # type: ignore[arg-type]
    return Train(service=service, ledger=trainer.ledger, trainer=trainer, shelf=shelf, dropped=dropped)


def of(step: int, trainer: str = "ann") -> MicrobatchId:
    return MicrobatchId(trainer, 1, step, 0)


async def test_a_microbatch_goes_through_and_counts(train: Train) -> None:
    await train.ask(LANE)
    await train.ask(Forward(lane="l", microbatch=of(0), samples=2), HIDDEN, torch.ones(2, 3, dtype=torch.uint8))
    await train.ask(Backward(lane="l", microbatch=of(0), tokens=6), HIDDEN)
    await train.ask(Commit(microbatch=of(0), span=HELD))
    assert train.ledger.tallies[2].tokens == 6
    assert (await train.ask(Evaluate(lane="l", item="e"), HIDDEN)).tensors[0].shape == HIDDEN.shape


async def test_an_evaluation_is_of_the_round_that_it_names(train: Train) -> None:
    train.shelf.add(Snapshot(label="t", round=2, digests={}))
    await train.ask(LANE)
    for number in (None, 1, 2, 3):
        await train.ask(Evaluate(lane="l", item="e", round=number), HIDDEN)
    assert train.trainer.evaluated == ["t", "s", "t", "t"], "the newest, where there is no other"


async def test_a_snapshot_stays_while_an_evaluation_waits_for_its_turn(train: Train) -> None:
    await train.ask(LANE)
    train.trainer.may_evaluate.clear()
    asking = asyncio.create_task(train.ask(Evaluate(lane="l", item="e", round=1), HIDDEN))
    await train.trainer.began.wait()
    for number in range(2, 6):
        train.dropped += [
            gone.label for gone in train.shelf.add(Snapshot(label=f"t{number}", round=number, digests={}))
        ]
    assert train.dropped == ["t2", "t3"]
    train.trainer.may_evaluate.set()
    await asking
    assert train.dropped == ["t2", "t3", "s"]


@pytest.mark.parametrize(
    ("message", "tensors"),
    [
        (Forward(lane="l", microbatch=of(0, "bob"), samples=2), [HIDDEN]),
        (Backward(lane="l", microbatch=of(0, "bob"), tokens=1), [HIDDEN]),
        (Commit(microbatch=of(0, "bob"), span=HELD), []),
        (Drop(microbatch=of(0, "bob")), []),
        (Forward(lane="l", microbatch=of(0), samples=3), [HIDDEN]),
        (OpenLane(lane="m", span=Span(1, 3)), []),
        (Forward(lane="m", microbatch=of(0), samples=2), [HIDDEN]),
        (Forward(lane="l", microbatch=of(0), samples=2), []),
        (Forward(lane="l", microbatch=of(0), samples=2), [HIDDEN[0]]),
        (Forward(lane="l", microbatch=of(0), samples=2), [HIDDEN.long()]),
        (Forward(lane="l", microbatch=of(0), samples=2), [torch.ones(2, 17, 8)]),
        (Forward(lane="l", microbatch=of(0), samples=2), [torch.ones(2, 0, 8)]),
        (Forward(lane="l", microbatch=of(0), samples=2), [HIDDEN, torch.full((2, 3), 2)]),
        (Forward(lane="l", microbatch=of(0), samples=2), [HIDDEN, torch.ones(2, 3)]),
        (Backward(lane="l", microbatch=of(0), tokens=7), [HIDDEN]),
        (AskInfo(), []),
    ],
)
async def test_what_is_not_right_is_refused(train: Train, message: Message, tensors: list[torch.Tensor]) -> None:
    await train.ask(LANE)
    with pytest.raises((BadMessage, Refused)):
        await train.ask(message, *tensors)
    assert not train.ledger.pieces()


async def test_a_closed_stream_drops_its_own_microbatches_only(train: Train) -> None:
    await train.ask(OpenLane(lane="1", span=HELD), stream=1)
    await train.ask(OpenLane(lane="2", span=HELD), stream=2)
    for step, lane in ((0, "1"), (1, "1"), (2, "2")):
        await train.ask(Forward(lane=lane, microbatch=of(step), samples=2), HIDDEN)
    await train.ask(Forward(lane="2", microbatch=of(1), samples=2), HIDDEN)  # sent again after a reconnect
    await train.service.stream_closed(PeerId("ann"), 1)
    assert [piece.microbatch.step for piece in train.ledger.pieces()] == [1, 2]


async def test_what_is_kept_per_microbatch_is_forgotten_with_it(train: Train) -> None:
    await train.ask(LANE)
    for step in range(1300):
        await train.ask(Forward(lane="l", microbatch=of(step), samples=2), HIDDEN)
        await train.ask(Drop(microbatch=of(step)))
    assert len(train.service._lane_of) <= 1024


async def test_on_a_lane_activations_come_from_before_and_gradients_from_behind(train: Train) -> None:
    await train.ask(OpenLane(lane="l", span=HELD, previous=Place(PeerId("bob"), "b"), onward=None))
    forward = Forward(lane="l", microbatch=of(0), samples=2)
    for peer in ("ann", "mallory"):
        with pytest.raises(BadMessage, match="neighbour"):
            await train.ask(forward, HIDDEN, peer=peer)
    assert (await train.ask(forward, HIDDEN, peer="bob")).tensors == ()
    collect = Collect(place="l", item=item_of(of(0)))
    with pytest.raises(BadMessage, match="owner alone"):
        await train.ask(collect, peer="bob")
    assert torch.equal((await train.ask(collect)).tensors[0], HIDDEN)
    with pytest.raises(BadMessage, match="neighbour"):
        await train.ask(Backward(lane="l", microbatch=of(0), tokens=6), HIDDEN, peer="bob")


async def test_work_that_cannot_go_on_says_where_it_ended(train: Train) -> None:
    behind, before = Place(PeerId("cem"), "c"), Place(PeerId("bob"), "b")
    await train.ask(OpenLane(lane="l", span=HELD, previous=before, onward=behind))
    answer = await train.ask(Forward(lane="l", microbatch=of(0), samples=2), HIDDEN, peer="bob")
    assert isinstance(answer.message, Broken)
    assert answer.message.place == behind
    assert answer.message.is_lost
    answer = await train.ask(Backward(lane="l", microbatch=of(0), tokens=6), HIDDEN, peer="cem")
    assert isinstance(answer.message, Broken)
    assert answer.message.place == before


async def test_an_owner_of_many_lanes_loses_the_oldest_and_nobody_else_does(train: Train) -> None:
    await train.ask(OpenLane(lane="other", span=HELD), peer="bob")
    for number in range(MAX_LANES_PER_OWNER + 1):
        await train.ask(OpenLane(lane=f"l{number}", span=HELD))
    with pytest.raises(Refused, match="open it again"):
        await train.ask(Evaluate(lane="l0", item="e"), HIDDEN)
    await train.ask(Evaluate(lane="l1", item="e"), HIDDEN)
    await train.ask(Evaluate(lane="other", item="e"), HIDDEN, peer="bob")
    with pytest.raises(BadMessage, match="another name"):
        await train.ask(OpenLane(lane="other", span=HELD))
