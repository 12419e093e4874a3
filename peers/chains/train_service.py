"""Serves the training of a span to others: microbatches forward, gradients back, commits; also held-out forwards.

What is computed goes on to the next host of the lane; the trainer collects it at the last one. An answer means that the
work is through the rest of the chain, or says where it ended.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from blocks.snapshots import Snapshot, SnapshotShelf
from blocks.spans import Span
from blocks.training.ledger import MicrobatchId, Piece
from blocks.training.span_trainer import Microbatch, SpanTrainer
from peers.chains.edge import Edge
from peers.chains.lanes import Lane, Lanes
from peers.chains.outbox import Asking, Onward, Outbox
from peers.chains.timings import told
from peers.errors import BadMessage, Refused
from peers.network import PeerId
from peers.streams.answering import Handler
from peers.streams.calls import Answer, Question
from peers.streams.messages import (
    Backward,
    Collect,
    Commit,
    Drop,
    Evaluate,
    Forward,
    Message,
    OpenLane,
    RefusalCode,
    StreamKind,
)

PASS_SECONDS = 120.0  # the rest of a chain has so long; a trainer's own deadline for all of it is the same
_PRUNE_FROM = 1024


def item_of(microbatch: MicrobatchId) -> str:
    """How a microbatch's result is named to who collects it."""
    return hashlib.sha256(repr(microbatch).encode()).hexdigest()[:32]


def _keep(snapshots: list[Snapshot]) -> None:
    """For a model without versions."""


class TrainService(Handler):
    """One host's `train` streams."""

    def __init__(
        self,
        trainer: SpanTrainer,
        shelf: SnapshotShelf,
        edge: Edge,
        pool: Asking,
        drop_versions: Callable[[list[Snapshot]], None] = _keep,
    ) -> None:
        """`drop_versions` removes snapshots from the model that nobody needs."""
        self._trainer, self._shelf, self._edge, self._drop_versions = trainer, shelf, edge, drop_versions
        self._onward = Onward(pool=pool, kind=StreamKind.TRAIN, seconds=PASS_SECONDS)
        self._lanes, self._outbox = Lanes(), Outbox()
        self._lane_of: dict[MicrobatchId, Lane] = {}
        self._prune_at = _PRUNE_FROM

    async def answer(self, question: Question) -> Answer:
        """Answer one question; see messages.py for what each carries."""
        match question.message:
            case OpenLane() as message:
                self._open(question, message)
            case Forward() as message:
                return await self._forward(question, message)
            case Backward() as message:
                return await self._backward(question, message)
            case Evaluate() as message:
                return await self._evaluate(question, message)
            case Collect() as message:
                lane = self._lanes.find(message.place)
                if lane.owner != question.peer:
                    raise BadMessage("what comes out of a lane is collected by its owner alone")
                result = await self._outbox.take(lane.name, message.item, seconds=PASS_SECONDS)
                return Answer(tensors=(result,))
            case Commit() as message:
                _check_owner(question.peer, message.microbatch)
                await self._trainer.commit(Piece(message.microbatch, message.span))
            case Drop() as message:
                _check_owner(question.peer, message.microbatch)
                self._trainer.drop(message.microbatch)
                lane_used = self._lane_of.pop(message.microbatch, None)
                if lane_used is not None:
                    self._outbox.close(lane_used.name, item_of(message.microbatch))
            case _:
                raise BadMessage(f"a '{question.message.kind}' message does not belong on a train stream")
        return Answer()

    async def stream_closed(self, peer: PeerId, stream: int) -> None:
        """Drop what the gone trainer left open; what it sent again over another stream stays."""
        for lane in self._lanes.close_stream(stream):
            self._outbox.close(lane.name)
        for microbatch in [m for m, lane in self._lane_of.items() if lane.stream == stream]:
            del self._lane_of[microbatch]
            self._trainer.drop(microbatch)

    def _open(self, question: Question, message: OpenLane) -> None:
        check_span(message.span, self._trainer.ledger.span)
        lane = Lane(
            name=message.lane,
            owner=question.peer,
            stream=question.stream,
            span=message.span,
            previous=message.previous,
            onward=message.onward,
        )
        self._lanes.open(lane)

    async def _forward(self, question: Question, message: Forward) -> Answer:
        lane = self._lanes.find(message.lane)
        lane.check_forward(question.peer)
        _check_owner(lane.owner, message.microbatch)
        hidden, mask = self._activations(question.tensors)
        if message.samples != hidden.shape[0]:
            raise BadMessage(f"{message.samples} samples are claimed for {hidden.shape[0]} rows")
        self._lane_of[message.microbatch] = lane
        microbatch = Microbatch(
            id=message.microbatch, span=lane.span, samples=message.samples, hidden_BTD=hidden, mask_BT=mask
        )
        began = time.monotonic()
        try:
            output = await self._trainer.forward(microbatch)
        finally:
            self._prune()
        seconds = time.monotonic() - began
        onward = Forward(
            lane="" if lane.onward is None else lane.onward.name,
            microbatch=message.microbatch,
            samples=message.samples,
        )
        passed = await self._hand_on(lane, item_of(message.microbatch), onward, _with(question, output))
        return told(passed, lane.name, seconds)

    async def _evaluate(self, question: Question, message: Evaluate) -> Answer:
        lane = self._lanes.find(message.lane)
        lane.check_forward(question.peer)
        hidden, mask = self._activations(question.tensors)
        asked = None if message.round is None else self._shelf.of_round(message.round)
        label = (asked or self._shelf.newest).label
        self._shelf.pin(label)  # what waits for its turn to compute must find it then
        try:
            output = await self._trainer.evaluate(hidden, mask, lane.span, label)
        finally:
            self._drop_versions(self._shelf.unpin(label))
        onward = replace(message, lane="" if lane.onward is None else lane.onward.name)
        return await self._hand_on(lane, message.item, onward, _with(question, output))

    async def _hand_on(self, lane: Lane, item: str, message: Message, done: Question) -> Answer:
        """What was computed, to the next host; at the last, to the trainer when it asks for it."""
        if lane.onward is not None:
            return await self._onward.send(lane.onward, message, done.tensors, done.wire)
        if lane.previous is None:
            return Answer(tensors=done.tensors[:1])
        self._outbox.put(lane.name, item, done.tensors[0])
        return Answer()

    async def _backward(self, question: Question, message: Backward) -> Answer:
        lane = self._lanes.find(message.lane)
        lane.check_backward(question.peer)
        _check_owner(lane.owner, message.microbatch)
        grad = self._edge.hidden(question.tensors, most=1)
        # Steps divide by the sum of these counts, so a false one would shrink what others have learnt.
        if message.tokens > grad.shape[0] * grad.shape[1]:
            raise BadMessage(f"{message.tokens} tokens are claimed for a gradient of {tuple(grad.shape[:2])}")
        piece = Piece(message.microbatch, lane.span)
        grad_input = await self._trainer.backward(piece, grad, tokens=message.tokens)
        if lane.previous is None:
            return Answer()  # the embedding is frozen: its gradient is nobody's
        back = Backward(lane=lane.previous.name, microbatch=message.microbatch, tokens=message.tokens)
        return await self._onward.send(lane.previous, back, (grad_input,), question.wire)

    def _prune(self) -> None:
        """Forget the lanes of microbatches that are counted or dropped, now and then."""
        if len(self._lane_of) >= self._prune_at:
            ledger = self._trainer.ledger
            live = {piece.microbatch for piece in ledger.pieces()}
            self._lane_of = {m: lane for m, lane in self._lane_of.items() if m in live}
            self._prune_at = max(_PRUNE_FROM, 2 * len(self._lane_of))

    def _activations(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden = self._edge.hidden(tensors, most=2)
        mask = self._edge.mask(tensors[1], *hidden.shape[:2]) if len(tensors) > 1 else None
        return hidden, mask


def _with(question: Question, output: torch.Tensor) -> Question:
    """The question with its activations as they leave this host."""
    return replace(question, tensors=(output, *question.tensors[1:]))


def _check_owner(peer: PeerId, microbatch: MicrobatchId) -> None:
    if microbatch.trainer != peer:
        raise BadMessage("a microbatch must carry the id of the peer that sends it, or that opened its lane")


def check_span(wanted: Span, held: Span) -> None:
    """Refuse blocks that are not held here.

    Raises:
        Refused: some block of `wanted` is outside `held`.
    """
    if not held.covers(wanted):
        raise Refused(f"blocks {wanted} are not all held here (this host holds {held})", RefusalCode.SPAN)
