"""One text over a chain of hosts: the client sends to the first and hears from the last.

Each host keeps what it put out. So when one dies, the host before it brings a replacement to where the text stands, by
one prefill. All hosts of a text serve the same state of the adapter, named by content; so it goes on unchanged.
"""

from __future__ import annotations

import logging
import time

import torch

from blocks.spans import Span
from peers.chains.collecting import Collecting
from peers.chains.decode_legs import Leg, Legs, SessionConfig
from peers.chains.history import History, StepInput, as_message
from peers.chains.timings import arrived, note
from peers.errors import NoRoute, PeerLost, Refused
from peers.network import PeerId
from peers.routes.router import Router
from peers.routes.routing import Hop
from peers.streams.calls import Answer
from peers.streams.messages import Broken, Collect, Message, RefusalCode, Resume, StreamKind
from peers.streams.pool import Pool
from peers.streams.values import Place

logger = logging.getLogger(__name__)

MOVE_STEPS = 16  # so often a text asks whether it would be faster elsewhere


class _LegFailed(Exception):
    """A leg did not do its part of a step."""

    def __init__(self, leg: Leg, error: PeerLost | Refused, *, in_resume: bool = False) -> None:
        super().__init__(str(error))
        self.leg, self.error, self.in_resume = leg, error, in_resume


class DecodeSession:
    """A session over the chain. Steps come one after the other; `close` frees the hosts' caches."""

    def __init__(self, pool: Pool, router: Router, whole: Span, config: SessionConfig) -> None:
        self._pool, self._router, self._whole, self._config = pool, router, whole, config
        self._opener = Legs(pool, router, config)
        self._legs: list[Leg] = []
        self._history = History()
        self._number = -1
        self._collecting = Collecting(_LegFailed)
        self.replaced = 0
        self.moved = 0

    @property
    def rounds(self) -> frozenset[int]:
        """The rounds whose adapter serves this text: one, unless no host had a common one."""
        return frozenset(leg.opened.round for leg in self._legs)

    @property
    def hops(self) -> tuple[Hop, ...]:
        """The hosts that serve this text now, in order."""
        return tuple(leg.hop for leg in self._legs)

    async def step(self, step: StepInput) -> torch.Tensor:
        """Feed the chain; returns what leaves the last block, [B, T, D] fp32.

        Raises:
            NoRoute: some blocks have no live holder.
            Refused: hosts refuse for a reason that others would share.
        """
        if not self._legs:
            self._legs = await self._opener.open(self._whole)
        self._number += 1
        self._history.add(step)
        output = await self._certainly()
        if self._number % MOVE_STEPS == MOVE_STEPS - 1 and await self._move():
            await self._certainly()  # nothing new comes of it, but those that took over have the text then
        return output.float()

    async def _certainly(self) -> torch.Tensor:
        """The present step, again while hosts fail in it, each time with others in their place."""
        shape = self._history.last_shape
        for _ in range(self._config.max_tries):
            try:
                output = await self._run()
                if output.shape != shape:
                    last = self._legs[-1]
                    raise _LegFailed(last, PeerLost(f"peer {last.hop.peer} answered with a tensor of another shape"))
            except _LegFailed as failed:
                await self._mend(failed)
                continue
            for leg in self._legs:
                leg.is_new = False
            return output
        raise NoRoute(f"a step failed {self._config.max_tries} times in a row; see the log for each reason")

    async def close(self) -> None:
        """Free the caches; a host that cannot be told frees its own by deadline."""
        self._collecting.cancel()
        legs, self._legs = self._legs, []
        await self._opener.close(legs)

    async def _move(self) -> bool:
        """Leave hosts that have become slow to faster ones; whether there were any."""
        moved = self.moved
        for leg in [leg for leg in self._legs if self._router.is_slow(leg.hop)]:
            place = self._legs.index(leg)
            try:
                await self._replace(place, frozenset({leg.hop.peer}))
            except (NoRoute, Refused) as error:
                logger.info("a slow host is kept peer=%s reason=%s", leg.hop.peer, error)
                continue
            logger.info("left a slow host peer=%s blocks=%s", leg.hop.peer, leg.hop.span)
            if place:  # one that is new itself is not asked to resume, which would tell it
                before = self._place(place - 2) if place > 1 else None
                await self._opener.link(self._legs[place - 1], before, self._place(place))
            self.moved += 1
            await self._opener.close([leg])
        return self.moved > moved

    async def _run(self) -> torch.Tensor:
        """The present step through the chain, from where it has to begin."""
        legs = self._legs
        begin = next((i for i, leg in enumerate(legs) if leg.is_new), 0)
        depth = 0
        while begin + depth < len(legs) and legs[begin + depth].is_new:
            depth += 1
        send = self._send(legs[0], depth) if begin == 0 else self._resume(begin, depth)
        if len(legs) > 1:
            return await self._collecting.result(send, self._collect(legs[-1]))
        output = await send
        assert output is not None
        return output

    async def _send(self, first: Leg, depth: int) -> torch.Tensor | None:
        """The client's own input to the first host; what comes out where there is no other."""
        step = self._history.again(depth)
        assert step is not None
        message, tensors = as_message(first.session, self._number, step)
        answer = await self._ask(first, message, tensors)
        if len(self._legs) > 1:
            return None
        if len(answer.tensors) != 1:
            raise _LegFailed(first, PeerLost(f"peer {first.hop.peer} answered a step without its result"))
        return answer.tensors[0]

    async def _resume(self, begin: int, depth: int) -> None:
        """Let the host before the new ones send them what they need."""
        before = self._legs[begin - 1]
        onward = self._legs[begin].place
        message = Resume(session=before.session, number=self._number, depth=depth, onward=onward)
        try:
            await self._ask(before, message)
        except _LegFailed as failed:
            raise _LegFailed(failed.leg, failed.error, in_resume=failed.leg is before) from failed

    async def _collect(self, last: Leg) -> torch.Tensor:
        answer = await self._ask(last, Collect(place=last.session, item=str(self._number)))
        if len(answer.tensors) != 1:
            raise _LegFailed(last, PeerLost(f"peer {last.hop.peer} answered without a result"))
        return answer.tensors[0]

    async def _ask(self, leg: Leg, message: Message, tensors: tuple[torch.Tensor, ...] = ()) -> Answer:
        """Ask one leg; a Broken answer means another one failed."""
        seconds, began = self._config.call_seconds, time.monotonic()
        try:
            answer = await self._pool.call(
                leg.hop.peer, StreamKind.DECODE, message, tensors, seconds=seconds, wire=self._config.wire
            )
        except (PeerLost, Refused) as error:
            raise _LegFailed(leg, error) from error
        broken = answer.message
        if isinstance(broken, Broken):
            failed = next((other for other in self._legs if other.place == broken.place), leg)
            reason = f"{broken.reason} (said peer {leg.hop.peer})"
            raise _LegFailed(failed, PeerLost(reason) if broken.is_lost else Refused(broken.reason, broken.code))
        timings = arrived(answer, time.monotonic() - began)
        if timings and tensors:
            hops = {other.session: other.hop for other in self._legs}
            note(self._router.paces, timings, hops, tensors[0].shape[0] * tensors[0].shape[1])
        return answer

    async def _mend(self, failed: _LegFailed) -> None:
        """Put other hosts in the place of the one that failed, so that the step can be run again."""
        leg, error = failed.leg, failed.error
        if isinstance(error, Refused) and error.code == RefusalCode.MALFORMED:
            raise error
        logger.warning("hop failed peer=%s reason=%s", leg.hop.peer, error)
        place = self._legs.index(leg)
        for done in self._legs[:place]:
            done.is_new = False  # the step came as far as to the one that failed
        if failed.in_resume and isinstance(error, Refused) and error.code == RefusalCode.SESSION and not leg.is_new:
            leg.is_new = True  # what it put out is not kept: it is sent all again, from further ahead
            return
        if isinstance(error, PeerLost):
            self._router.failed(leg.hop.peer, str(error))
        else:
            await self._opener.close([leg])
        self.replaced += 1
        is_full = isinstance(error, Refused) and error.code == RefusalCode.FULL
        await self._replace(place, frozenset({leg.hop.peer}) if is_full else frozenset())

    async def _replace(self, place: int, full: frozenset[PeerId]) -> None:
        """Other hosts for a leg's blocks, with the same bits of the adapter, known to their neighbours.

        Those that are `full` only if there is no other.
        """
        leg = self._legs[place]
        previous = self._legs[place - 1].place if place else None
        following = self._legs[place + 1] if place + 1 < len(self._legs) else None
        onward = None if following is None else following.place
        try:
            fresh = await self._opener.open(
                leg.hop.span,
                leg.opened.digests or None,
                previous=previous,
                onward=onward,
                avoid=full,
                at_least=self._history.length,
            )
        except Refused as error:
            if error.code == RefusalCode.ADAPTER:
                raise NoRoute(
                    f"no other host of blocks {leg.hop.span} serves the adapter with which this text began; "
                    "it may have been withdrawn, see `swarm status`"
                ) from error
            if error.code != RefusalCode.SNAPSHOT:
                raise
            raise NoRoute(
                f"no other host holds blocks {leg.hop.span} with the adapter of round {leg.opened.round}, with "
                "which this text began; begin the text again"
            ) from error
        self._legs[place : place + 1] = fresh
        if following is not None:
            await self._opener.link(following, fresh[-1].place, self._place(place + len(fresh) + 1))

    def _place(self, i: int) -> Place | None:
        return self._legs[i].place if i < len(self._legs) else None
