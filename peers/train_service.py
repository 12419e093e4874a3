"""Serves the training of a span to others: microbatches forward, gradients back, commits; also held-out forwards."""

from __future__ import annotations

import torch

from blocks.ledger import MicrobatchId, Piece
from blocks.snapshots import SnapshotShelf
from blocks.spans import Span
from blocks.training import Microbatch, SpanTrainer
from peers.answering import Handler
from peers.calls import Answer, Question
from peers.edge import Edge
from peers.errors import BadMessage, Refused
from peers.messages import Backward, Commit, Drop, Evaluate, Forward, RefusalCode
from peers.network import PeerId

_PRUNE_FROM = 1024


class TrainService(Handler):
    """One host's `train` streams."""

    def __init__(self, trainer: SpanTrainer, shelf: SnapshotShelf, edge: Edge) -> None:
        self._trainer, self._shelf, self._edge = trainer, shelf, edge
        self._stream_of: dict[MicrobatchId, int] = {}
        self._prune_at = _PRUNE_FROM

    async def answer(self, question: Question) -> Answer:
        """Answer one question; see messages.py for what each carries."""
        match question.message:
            case Forward() as message:
                return await self._forward(question, message)
            case Backward() as message:
                return await self._backward(question, message)
            case Commit() as message:
                self._check_owner(question.peer, message.microbatch)
                await self._trainer.commit(Piece(message.microbatch, message.span))
            case Drop() as message:
                self._check_owner(question.peer, message.microbatch)
                self._trainer.drop(message.microbatch)
            case Evaluate() as message:
                check_span(message.span, self._trainer.ledger.span)
                hidden, mask = self._activations(question.tensors)
                label = self._shelf.newest.label
                return Answer(tensors=(await self._trainer.evaluate(hidden, mask, message.span, label),))
            case _:
                raise BadMessage(f"a '{question.message.kind}' message does not belong on a train stream")
        return Answer()

    async def stream_closed(self, peer: PeerId, stream: int) -> None:
        """Drop what the gone trainer left open; what it sent again over another stream stays."""
        for microbatch in [m for m, owner in self._stream_of.items() if owner == stream]:
            del self._stream_of[microbatch]
            self._trainer.drop(microbatch)

    async def _forward(self, question: Question, message: Forward) -> Answer:
        self._check_owner(question.peer, message.microbatch)
        check_span(message.span, self._trainer.ledger.span)
        hidden, mask = self._activations(question.tensors)
        if message.samples != hidden.shape[0]:
            raise BadMessage(f"{message.samples} samples are claimed for {hidden.shape[0]} rows")
        self._stream_of[message.microbatch] = question.stream
        microbatch = Microbatch(
            id=message.microbatch, span=message.span, samples=message.samples, hidden_BTD=hidden, mask_BT=mask
        )
        try:
            return Answer(tensors=(await self._trainer.forward(microbatch),))
        finally:
            self._prune()

    async def _backward(self, question: Question, message: Backward) -> Answer:
        self._check_owner(question.peer, message.microbatch)
        grad = self._edge.hidden(question.tensors, most=1)
        # Steps divide by the sum of these counts, so a false one would shrink what others have learnt.
        if message.tokens > grad.shape[0] * grad.shape[1]:
            raise BadMessage(f"{message.tokens} tokens are claimed for a gradient of {tuple(grad.shape[:2])}")
        piece = Piece(message.microbatch, message.span)
        return Answer(tensors=(await self._trainer.backward(piece, grad, tokens=message.tokens),))

    def _prune(self) -> None:
        """Forget the streams of microbatches that are counted or dropped, now and then."""
        if len(self._stream_of) >= self._prune_at:
            ledger = self._trainer.ledger
            live = {piece.microbatch for piece in ledger.pieces()}
            self._stream_of = {m: stream for m, stream in self._stream_of.items() if m in live}
            self._prune_at = max(_PRUNE_FROM, 2 * len(self._stream_of))

    def _activations(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden = self._edge.hidden(tensors, most=2)
        mask = self._edge.mask(tensors[1], *hidden.shape[:2]) if len(tensors) > 1 else None
        return hidden, mask

    def _check_owner(self, peer: PeerId, microbatch: MicrobatchId) -> None:
        if microbatch.trainer != peer:
            raise BadMessage("a microbatch must carry the id of the peer that sends it")


def check_span(wanted: Span, held: Span) -> None:
    """Refuse blocks that are not held here.

    Raises:
        Refused: some block of `wanted` is outside `held`.
    """
    if not held.covers(wanted):
        raise Refused(f"blocks {wanted} are not all held here (this host holds {held})", RefusalCode.SPAN)
