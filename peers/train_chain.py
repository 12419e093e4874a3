"""Carries microbatches of a trainer through a chain of hosts: forward, back, commit, once per block whatever dies.

The trainer keeps each hop's input and output gradient until the commit. So when a host fails, only its blocks are done
again, on another holder, and the other hosts never count a microbatch twice.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import torch

from blocks.ledger import MicrobatchId
from blocks.spans import Span
from peers.calls import Answer
from peers.errors import NoRoute, PeerLost, Refused
from peers.messages import Backward, Commit, Drop, Evaluate, Forward, Message, RefusalCode, StreamKind
from peers.network import PeerId
from peers.pool import Pool
from peers.router import Router
from peers.routing import Hop

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChainConfig:
    """How long one hop may take, how often one hop's work is tried, and in which dtype activations travel."""

    call_seconds: float = 120.0
    max_tries: int = 12
    wire_dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.call_seconds <= 0 or self.max_tries < 1:
            raise ValueError("chain.call_seconds and chain.max_tries must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One microbatch on the trainer's side: hidden [B, T, D] enters block 0, mask [B, T] is 1 at tokens."""

    id: MicrobatchId
    hidden_BTD: torch.Tensor
    mask_BT: torch.Tensor | None

    @property
    def samples(self) -> int:
        """Rows of the microbatch."""
        return int(self.hidden_BTD.shape[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadResult:
    """The trainer's own end of a pass: summed token loss, its gradient [B, T, D], tokens that had a label."""

    loss: float
    grad_BTD: torch.Tensor
    tokens: int


Head = Callable[[torch.Tensor], Awaitable[HeadResult]]


@dataclass(slots=True)
class _Leg:
    hop: Hop
    input: torch.Tensor
    grad: torch.Tensor | None = None


class TrainChain:
    """All microbatches of one trainer go through here; several at a time are fine."""

    def __init__(self, pool: Pool, router: Router, num_blocks: int, config: ChainConfig) -> None:
        self._pool, self._router, self._config = pool, router, config
        self._whole = Span(0, num_blocks)
        self.repeated = 0

    async def train(self, work: Work, head: Head) -> HeadResult:
        """Forward, loss, backward and commit of one microbatch; returns what the head said.

        Raises:
            NoRoute: some blocks have no live holder, for longer than the router waits.
            Refused: a host refuses this work for a reason that another host would share.
        """
        legs: list[_Leg] = []
        try:
            hidden = await self._forward(work, self._whole, work.hidden_BTD, legs)
            result = await head(hidden)
            grad = result.grad_BTD
            for leg in reversed(list(legs)):
                leg.grad = grad
                grad = await self._backward(work, leg, result.tokens, legs)
            for leg in list(legs):
                await self._commit(work, leg, result.tokens)
        except BaseException:
            await self._drop(work, legs)
            raise
        return result

    async def evaluate(self, hidden_BTD: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
        """A forward pass through the last completed round's adapter; [B, T, D] fp32.

        Raises:
            NoRoute, Refused: as for train.
        """
        return await self._walk(self._whole, hidden_BTD, mask_BT, lambda span: Evaluate(span=span), [])

    async def _forward(self, work: Work, span: Span, hidden: torch.Tensor, legs: list[_Leg]) -> torch.Tensor:
        """A training forward through `span`, appending a leg per hop."""

        def message(part: Span) -> Forward:
            return Forward(microbatch=work.id, span=part, samples=work.samples)

        return await self._walk(span, hidden, work.mask_BT, message, legs)

    async def _walk(
        self,
        span: Span,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        message: Callable[[Span], Message],
        legs: list[_Leg],
    ) -> torch.Tensor:
        """Run `span` forward; a failed hop's blocks go to other holders."""
        start, tries = span.start, 0
        while start < span.end:
            for hop in await self._router.spread(Span(start, span.end)):
                try:
                    output = await self._ask(hop.peer, message(hop.span), hidden, mask)
                except (PeerLost, Refused) as error:
                    tries = self._note_failure(hop.peer, error, tries)
                    break
                legs.append(_Leg(hop=hop, input=hidden))
                hidden, start = output, hop.span.end
        return hidden

    async def _backward(self, work: Work, leg: _Leg, tokens: int, legs: list[_Leg]) -> torch.Tensor:
        """The gradient of a leg's input. A leg that fails is replaced in `legs` by those that did its work."""
        assert leg.grad is not None
        try:
            message = Backward(microbatch=work.id, span=leg.hop.span, tokens=tokens)
            return await self._ask(leg.hop.peer, message, leg.grad)
        except (PeerLost, Refused) as error:
            self._note_failure(leg.hop.peer, error, 0)
        place = legs.index(leg)
        fresh, grad = await self._again(work, leg, tokens)
        legs[place : place + 1] = fresh
        return grad

    async def _again(self, work: Work, leg: _Leg, tokens: int) -> tuple[list[_Leg], torch.Tensor]:
        """Forward and backward of one leg's blocks once more, wherever they are held now."""
        assert leg.grad is not None
        for _ in range(self._config.max_tries):
            self.repeated += 1
            fresh: list[_Leg] = []
            await self._forward(work, leg.hop.span, leg.input, fresh)
            grad = leg.grad
            try:
                for each in reversed(fresh):
                    each.grad = grad
                    message = Backward(microbatch=work.id, span=each.hop.span, tokens=tokens)
                    grad = await self._ask(each.hop.peer, message, grad)
            except (PeerLost, Refused) as error:
                self._note_failure(each.hop.peer, error, 0)
                continue
            return fresh, grad
        raise NoRoute(
            f"blocks {leg.hop.span} failed {self._config.max_tries} times in a row; see the log for each reason"
        )

    async def _commit(self, work: Work, leg: _Leg, tokens: int) -> None:
        """Commit one leg; where its host is gone or dropped it, do its blocks again and commit those."""
        todo = [leg]
        tries = 0
        while todo:
            current = todo.pop()
            for attempt in range(2):  # twice at the same host: a commit whose answer was lost may have counted
                try:
                    await self._call(current.hop.peer, Commit(microbatch=work.id, span=current.hop.span), ())
                    break
                except PeerLost as error:
                    if attempt == 1:
                        tries = self._note_failure(current.hop.peer, error, tries)
                        todo.extend((await self._again(work, current, tokens))[0])
                except Refused as error:
                    tries = self._note_failure(current.hop.peer, error, tries)
                    todo.extend((await self._again(work, current, tokens))[0])
                    break

    async def _drop(self, work: Work, legs: list[_Leg]) -> None:
        """Tell hosts that a microbatch is given up; those that cannot be told drop it by their own deadline."""
        for leg in legs:
            try:
                await self._pool.call(leg.hop.peer, StreamKind.TRAIN, Drop(microbatch=work.id), seconds=2.0)
            except (PeerLost, Refused) as error:
                logger.debug("drop not delivered peer=%s reason=%s", leg.hop.peer, error)

    async def _call(self, peer: PeerId, message: Message, tensors: tuple[torch.Tensor, ...]) -> Answer:
        return await self._pool.call(peer, StreamKind.TRAIN, message, tensors, seconds=self._config.call_seconds)

    async def _ask(
        self, peer: PeerId, message: Message, values: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Send activations or gradients, get back a tensor of the same shape, fp32."""
        sent = values if peer == self._pool.me else values.to(self._config.wire_dtype)
        tensors = (sent,) if mask is None else (sent, mask.to(torch.uint8))
        answer = await self._call(peer, message, tensors)
        if len(answer.tensors) != 1 or answer.tensors[0].shape != values.shape:
            raise PeerLost(f"peer {peer} answered with a tensor of another shape")
        return answer.tensors[0].float()

    def _note_failure(self, peer: PeerId, error: Exception, tries: int) -> int:
        """Steer later routes by what went wrong; counts, and raises what no other host would do better."""
        if isinstance(error, Refused) and error.code == RefusalCode.MALFORMED:
            raise error
        logger.warning("hop failed peer=%s reason=%s", peer, error)
        if not (isinstance(error, Refused) and error.code == RefusalCode.SESSION):
            self._router.failed(peer, str(error))
        if tries + 1 >= self._config.max_tries:
            raise NoRoute(f"a microbatch failed {tries + 1} times, last at peer {peer}: {error}") from error
        return tries + 1
