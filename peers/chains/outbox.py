"""What comes out at the end of a chain, until its owner collects it; and the passing on in the middle of one."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from peers.chains.timings import arrived
from peers.errors import PeerLost, Refused
from peers.network import PeerId
from peers.streams.calls import Answer
from peers.streams.messages import Broken, Done, Message, RefusalCode
from peers.streams.values import Place
from peers.streams.wire_format import WireFormat

MAX_UNCOLLECTED = 1024
MAX_UNCOLLECTED_BYTES = 256 << 20


class Asking(Protocol):
    """The part of pool.Pool that passing on needs."""

    async def call(
        self,
        peer: PeerId,
        kind: str,
        message: Message,
        tensors: Sequence[torch.Tensor] = (),
        *,
        seconds: float,
        wire: WireFormat | None = None,
    ) -> Answer:
        """See Pool.call."""


class Outbox:
    """Results by place and item. A collector may come before its result or after it; each result is taken once."""

    def __init__(self) -> None:
        self._results: OrderedDict[tuple[str, str], torch.Tensor] = OrderedDict()
        self._awaited: dict[tuple[str, str], asyncio.Future[torch.Tensor]] = {}

    def put(self, place: str, item: str, result: torch.Tensor) -> None:
        """Give a result to whoever waits for it, or keep it; the oldest go where too much was never collected."""
        future = self._awaited.pop((place, item), None)
        if future is not None and not future.done():
            future.set_result(result)
            return
        self._results[place, item] = result
        while len(self._results) > MAX_UNCOLLECTED or (
            len(self._results) > 1
            and sum(kept.numel() * kept.element_size() for kept in self._results.values()) > MAX_UNCOLLECTED_BYTES
        ):
            self._results.popitem(last=False)

    async def take(self, place: str, item: str, *, seconds: float) -> torch.Tensor:
        """Wait for a result.

        Raises:
            Refused: it did not come within `seconds`, the place was closed, or another collector came for it.
        """
        if (place, item) in self._results:
            return self._results.pop((place, item))
        self._cancel(place, item)
        future: asyncio.Future[torch.Tensor] = asyncio.get_running_loop().create_future()
        self._awaited[place, item] = future
        try:
            async with asyncio.timeout(seconds):
                return await future
        except TimeoutError as error:
            reason = f"nothing came out here within {seconds:.0f} s; send the work again"
            raise Refused(reason, RefusalCode.SESSION) from error
        finally:
            if self._awaited.get((place, item)) is future:
                del self._awaited[place, item]

    def close(self, place: str, item: str | None = None) -> None:
        """Forget all of a place, or one item of it, and tell who waits."""
        for key in [key for key in self._results if key[0] == place and item in (None, key[1])]:
            del self._results[key]
        for key in [key for key in self._awaited if key[0] == place and item in (None, key[1])]:
            self._cancel(*key)

    def _cancel(self, place: str, item: str) -> None:
        future = self._awaited.pop((place, item), None)
        if future is not None and not future.done():
            future.set_exception(Refused("this is not waited for any more; send the work again", RefusalCode.SESSION))


@dataclass(frozen=True, kw_only=True, slots=True)
class Onward:
    """Passes work on to the next host of a chain, over streams of one kind."""

    pool: Asking
    kind: str
    seconds: float

    async def send(
        self, place: Place, message: Message, tensors: Sequence[torch.Tensor], wire: WireFormat | None
    ) -> Answer:
        """Send, and wait until the work is through the chain: Done, or a Broken that says where it ended."""
        began = time.monotonic()
        try:
            answer = await self.pool.call(place.peer, self.kind, message, tensors, seconds=self.seconds, wire=wire)
        except PeerLost as error:
            return Answer(message=Broken(place=place, is_lost=True, code=RefusalCode.INTERNAL, reason=str(error)))
        except Refused as error:
            return Answer(message=Broken(place=place, is_lost=False, code=error.code, reason=str(error)))
        if isinstance(answer.message, Broken):
            return Answer(message=answer.message)
        return Answer(message=Done(timings=arrived(answer, time.monotonic() - began)))
