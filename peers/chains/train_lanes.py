"""The trainer's side of lanes: opened once for each chain that its microbatches take, and used by all of them."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from peers.chains.collecting import Collecting
from peers.chains.timings import arrived, note
from peers.errors import PeerLost, Refused, reason_of
from peers.routes.paces import Paces
from peers.routes.routing import Hop
from peers.streams.calls import Answer
from peers.streams.messages import Broken, Collect, Message, OpenLane
from peers.streams.pool import Pool
from peers.streams.values import Place
from peers.streams.wire_format import WireFormat

logger = logging.getLogger(__name__)

MAX_CHAINS = 64  # kept open; hosts keep twice as many for one trainer


class HopFailed(Exception):
    """One hop of a chain did not do its part."""

    def __init__(self, hop: Hop, error: PeerLost | Refused) -> None:
        super().__init__(reason_of(hop.peer, error))
        self.hop, self.error = hop, error


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenLanes:
    """A chain whose hosts know each other: `names` are the lanes at `hops`."""

    hops: tuple[Hop, ...]
    names: tuple[str, ...]

    @property
    def first(self) -> str:
        """The lane where activations go in."""
        return self.names[0]

    @property
    def last(self) -> str:
        """The lane where they come out."""
        return self.names[-1]

    def place(self, i: int) -> Place | None:
        """How the neighbours of hop `i` name it; None outside the chain."""
        return Place(self.hops[i].peer, self.names[i]) if 0 <= i < len(self.hops) else None


class TrainLanes:
    """Opens chains and asks their hosts. Lanes end with the stream that they were opened over."""

    def __init__(self, pool: Pool, paces: Paces, kind: str, *, seconds: float, wire: WireFormat) -> None:
        self._pool, self._kind, self._seconds, self._wire = pool, kind, seconds, wire
        self._paces = paces
        self._chains: OrderedDict[tuple[Hop, ...], asyncio.Task[OpenLanes]] = OrderedDict()
        self._collecting = Collecting(HopFailed)

    async def open(self, hops: tuple[Hop, ...]) -> OpenLanes:
        """The lanes of a chain, opened at all its hosts at once where they are not open yet.

        Raises:
            HopFailed: a host is gone or refuses.
        """
        task = self._chains.get(hops)
        if task is None:
            task = self._chains[hops] = asyncio.create_task(self._open(hops))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, if nobody waits any more
            while len(self._chains) > MAX_CHAINS:
                self._chains.popitem(last=False)
        self._chains.move_to_end(hops)
        try:
            return await asyncio.shield(task)
        except HopFailed:
            self._forget(hops, task)
            raise

    async def ask(self, lanes: OpenLanes, i: int, message: Message, tensors: Sequence[torch.Tensor] = ()) -> Answer:
        """Ask host `i` of a chain; work that it passes on is through the chain when it answers. What each host says of
        the time that it took is kept.

        Raises:
            HopFailed: it failed, or another host of the chain; the chain is opened anew when it is next used.
        """
        hop = lanes.hops[i]
        began = time.monotonic()
        try:
            answer = await self._pool.call(
                hop.peer, self._kind, message, tensors, seconds=self._seconds, wire=self._wire
            )
        except (PeerLost, Refused) as error:
            self._chains.pop(lanes.hops, None)
            raise HopFailed(hop, error) from error
        broken = answer.message
        if isinstance(broken, Broken):
            self._chains.pop(lanes.hops, None)
            places = [lanes.place(other) for other in range(len(lanes.hops))]
            failed = lanes.hops[places.index(broken.place)] if broken.place in places else hop
            reason = f"{broken.reason} (said peer {hop.peer})"
            raise HopFailed(failed, PeerLost(reason) if broken.is_lost else Refused(broken.reason, broken.code))
        timings = arrived(answer, time.monotonic() - began)
        if timings and tensors:
            num_tokens = tensors[0].shape[0] * tensors[0].shape[1]
            note(self._paces, timings, dict(zip(lanes.names, lanes.hops, strict=True)), num_tokens)
        return answer

    async def through(
        self, lanes: OpenLanes, message: Message, item: str, tensors: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Send into the first lane, and return what comes out of the last.

        Raises:
            HopFailed: a host of the chain failed.
        """
        last = len(lanes.hops) - 1
        send = self.ask(lanes, 0, message, tensors)
        if not last:
            return self._result(lanes, await send)
        collect = self.ask(lanes, last, Collect(place=lanes.last, item=item))
        return self._result(lanes, await self._collecting.result(send, collect))

    async def _open(self, hops: tuple[Hop, ...]) -> OpenLanes:
        lanes = OpenLanes(hops=hops, names=tuple(uuid.uuid4().hex for _ in hops))
        found = await asyncio.gather(
            *(self._open_one(lanes, i) for i in range(len(hops))),
            return_exceptions=True,
        )
        for hop, error in zip(hops, found, strict=True):
            if isinstance(error, (PeerLost, Refused)):
                raise HopFailed(hop, error) from error
            if error is not None:
                raise error
        return lanes

    async def _open_one(self, lanes: OpenLanes, i: int) -> None:
        message = OpenLane(
            lane=lanes.names[i], span=lanes.hops[i].span, previous=lanes.place(i - 1), onward=lanes.place(i + 1)
        )
        await self._pool.call(lanes.hops[i].peer, self._kind, message, seconds=self._seconds)

    def _forget(self, hops: tuple[Hop, ...], task: asyncio.Task[OpenLanes]) -> None:
        if self._chains.get(hops) is task:
            del self._chains[hops]

    def _result(self, lanes: OpenLanes, answer: Answer) -> torch.Tensor:
        if len(answer.tensors) != 1:
            last = lanes.hops[-1]
            raise HopFailed(last, PeerLost(f"peer {last.peer} answered without a result"))
        return answer.tensors[0]
