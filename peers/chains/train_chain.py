"""Carries microbatches of a trainer through a chain of hosts: forward, back, commit, once per block whatever dies.

The trainer sends to the first host and hears from the last; gradients go in at the last and end at the first. When a
host fails, another takes its place and the microbatch goes again under its id, through the same other hosts: those that
had counted it for their blocks do not count it twice.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from blocks.spans import Span
from blocks.training.ledger import MicrobatchId
from peers.chains.train_lanes import HopFailed, OpenLanes, TrainLanes
from peers.chains.train_service import item_of
from peers.errors import NoRoute, PeerLost, Refused, reason_of
from peers.routes.router import Router
from peers.routes.routing import Hop
from peers.streams.messages import Backward, Commit, Drop, Evaluate, Forward, Message, RefusalCode, StreamKind
from peers.streams.pool import Pool
from peers.streams.wire_format import WireFormat

logger = logging.getLogger(__name__)

T = TypeVar("T")

_HOLD_SECONDS = 1.0  # without others in the place of a host that failed, until the rest may forget the microbatch


@dataclass(frozen=True, kw_only=True, slots=True)
class ChainConfig:
    """How long one pass through a chain may take, how often it is tried, and in which form activations travel."""

    call_seconds: float = 120.0
    max_tries: int = 12
    wire: WireFormat = WireFormat.BF16

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


class TrainChain:
    """All microbatches of one trainer go through here; several at a time are fine."""

    def __init__(self, pool: Pool, router: Router, num_blocks: int, config: ChainConfig) -> None:
        self._pool, self._router, self._config = pool, router, config
        self._lanes = TrainLanes(pool, router.paces, StreamKind.TRAIN, seconds=config.call_seconds, wire=config.wire)
        self._whole = Span(0, num_blocks)
        self.repeated = 0

    async def train(self, work: Work, head: Head) -> HeadResult:
        """Forward, loss, backward and commit of one microbatch; returns what the head said.

        Raises:
            NoRoute: some blocks have no live holder, for longer than the router waits.
            Refused: a host refuses this work for a reason that another host would share.
        """
        hops: tuple[Hop, ...] = ()

        async def let_go() -> None:
            await self._drop(work.id, hops)

        async def once(lanes: OpenLanes) -> HeadResult:
            nonlocal hops
            hops = lanes.hops
            message = Forward(lane=lanes.first, microbatch=work.id, samples=work.samples)
            hidden = await self._through(lanes, message, item_of(work.id), work.hidden_BTD, work.mask_BT)
            result = await head(hidden)
            back = Backward(lane=lanes.last, microbatch=work.id, tokens=result.tokens)
            await self._lanes.ask(lanes, len(lanes.hops) - 1, back, (result.grad_BTD,))
            await self._commit(lanes, work.id)
            return result

        try:
            return await self._try(once, work.hidden_BTD, let_go)
        except BaseException:
            await let_go()
            raise

    async def evaluate(
        self, hidden_BTD: torch.Tensor, mask_BT: torch.Tensor | None, *, number: int | None = None
    ) -> torch.Tensor:
        """A forward pass through the adapter of round `number`, or the last completed one where a host has that no more
        or none is named; [B, T, D] fp32.

        Raises:
            NoRoute, Refused: as for train.
        """

        async def once(lanes: OpenLanes) -> torch.Tensor:
            item = uuid.uuid4().hex
            message = Evaluate(lane=lanes.first, item=item, round=number)
            return await self._through(lanes, message, item, hidden_BTD, mask_BT)

        async def let_go() -> None:
            """Hosts keep nothing of it."""

        return await self._try(once, hidden_BTD, let_go)

    async def _try(
        self,
        once: Callable[[OpenLanes], Awaitable[T]],
        hidden_BTD: torch.Tensor,
        let_go: Callable[[], Awaitable[None]],
    ) -> T:
        """Do the whole of a work, again while hosts fail in it, each time with others in their place.

        Where there are no others yet, `let_go`: what stays open at the rest would hold up their rounds, and those that
        are to take the place.
        """
        num_tokens = hidden_BTD.shape[0] * hidden_BTD.shape[1]
        hops = await self._router.spread(self._whole, num_tokens)
        failed: HopFailed | None = None
        for attempt in range(self._config.max_tries):
            self.repeated += attempt > 0
            try:
                with self._router.paces.working(hops):
                    return await once(await self._lanes.open(hops))
            except HopFailed as error:
                failed = error
                await self._note(error)
            place = hops.index(failed.hop)
            # The rest of the chain stays, as it may have counted the microbatch.
            try:
                async with asyncio.timeout(_HOLD_SECONDS):
                    others = await self._router.spread(failed.hop.span, num_tokens)
            except TimeoutError:
                await let_go()
                others = await self._router.spread(failed.hop.span, num_tokens)
            hops = (*hops[:place], *others, *hops[place + 1 :])
        assert failed is not None
        raise NoRoute(
            f"a microbatch failed {self._config.max_tries} times, last: {reason_of(failed.hop.peer, failed.error)}"
        ) from failed

    async def _through(
        self, lanes: OpenLanes, message: Message, item: str, hidden_BTD: torch.Tensor, mask_BT: torch.Tensor | None
    ) -> torch.Tensor:
        """Activations in at the first host, out at the last: [B, T, D] fp32."""
        tensors = (hidden_BTD,) if mask_BT is None else (hidden_BTD, mask_BT.to(torch.uint8))
        output = await self._lanes.through(lanes, message, item, tensors)
        if output.shape != hidden_BTD.shape:
            last = lanes.hops[-1]
            raise HopFailed(last, PeerLost(f"peer {last.peer} answered with a tensor of another shape"))
        return output.float()

    async def _commit(self, lanes: OpenLanes, microbatch: MicrobatchId) -> None:
        """Commit at all hosts at once. Where one is gone or dropped it, the rest stays counted."""
        found = await asyncio.gather(*(self._commit_one(hop, microbatch) for hop in lanes.hops), return_exceptions=True)
        errors = [error for error in found if error is not None]
        if errors:
            raise next((error for error in errors if not isinstance(error, HopFailed)), errors[0])

    async def _commit_one(self, hop: Hop, microbatch: MicrobatchId) -> None:
        message = Commit(microbatch=microbatch, span=hop.span)
        for attempt in range(2):  # twice at the same host: a commit whose answer was lost may have counted
            try:
                await self._pool.call(hop.peer, StreamKind.TRAIN, message, seconds=self._config.call_seconds)
                return
            except PeerLost as error:
                if attempt == 1:
                    raise HopFailed(hop, error) from error
            except Refused as error:
                raise HopFailed(hop, error) from error

    async def _drop(self, microbatch: MicrobatchId, hops: tuple[Hop, ...]) -> None:
        """Tell hosts that a microbatch is given up; those that cannot be told drop it by their own deadline."""
        await asyncio.gather(*(self._drop_one(hop, microbatch) for hop in hops))

    async def _drop_one(self, hop: Hop, microbatch: MicrobatchId) -> None:
        try:
            await self._pool.call(hop.peer, StreamKind.TRAIN, Drop(microbatch=microbatch), seconds=2.0)
        except (PeerLost, Refused) as error:
            logger.debug("drop not delivered peer=%s reason=%s", hop.peer, error)

    async def _note(self, failed: HopFailed) -> None:
        """Steer later routes by what went wrong; raises what no other host would do better."""
        peer, error = failed.hop.peer, failed.error
        code = error.code if isinstance(error, Refused) else None
        if code == RefusalCode.MALFORMED:
            raise error
        logger.warning("hop failed peer=%s reason=%s", peer, error)
        if code in {RefusalCode.SPAN, RefusalCode.BUSY}:
            await self._router.refused(failed.hop, str(error))
        elif code != RefusalCode.SESSION:
            self._router.failed(peer, str(error))
