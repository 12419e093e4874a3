"""From an order's events to an HTTP answer, whole or as a stream; an asker that hangs up ends its texts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from swarm.gateway.answers import AsciiResponse, ChatShape, Gathered, dumps, usage
from swarm.gateway.desk import Order
from swarm.gateway.failures import bug, failure_of
from swarm.gateway.writing import Event, Failed

logger = logging.getLogger(__name__)

T = TypeVar("T")
_SEND_SECONDS = 60.0  # an asker that reads nothing for so long is taken for gone
_GONE = 499


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request whose texts are being written. `close` gives back what it holds, once."""

    order: Order
    shape: ChatShape
    choices: int
    prompt_tokens: int
    includes_usage: bool
    receive: Receive
    close: Callable[[], None]


async def whole_answer(asked: Asked) -> Response:
    """All choices in one answer.

    Raises:
        ApiFailure: what went wrong with the first text that failed; a bug is raised as it is.
    """
    choices = [Gathered() for _ in range(asked.choices)]

    async def gather() -> Response:
        async for number, event in asked.order.events():
            if isinstance(event, Failed):
                raise failure_of(event.error) or event.error
            choices[number].add(event)
        counts = usage(asked.prompt_tokens, sum(choice.count for choice in choices))
        return AsciiResponse(asked.shape.whole(choices, counts))

    try:
        return await _unless_gone(gather(), asked.receive) or Response(status_code=_GONE)
    finally:
        asked.order.cancel()
        asked.close()


async def stream_answer(asked: Asked) -> Response:
    """A stream, once its first event has come: what goes wrong before that still has a status of its own.

    Raises:
        ApiFailure: the first text failed before anything came of it; a bug is raised as it is.
    """
    events = asked.order.events()
    try:
        first = await _unless_gone(anext(events), asked.receive)
        if first is not None and isinstance(first[1], Failed):
            raise failure_of(first[1].error) or first[1].error
    except BaseException:
        asked.order.cancel()
        asked.close()
        raise
    if first is None:
        asked.order.cancel()
        asked.close()
        return Response(status_code=_GONE)
    return EventStream(_lines(asked, first, events), asked)


class EventStream(Response):
    """Server-sent events, until the texts end or the asker hangs up."""

    def __init__(self, lines: AsyncIterator[bytes], asked: Asked) -> None:
        self._lines, self._asked = lines, asked
        super().__init__(
            media_type="text/event-stream", headers={"cache-control": "no-store", "x-accel-buffering": "no"}
        )

    def init_headers(self, headers: object = None) -> None:
        """Without a length, which is not known."""
        super().init_headers(headers)  # type: ignore[arg-type]
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        try:
            await _unless_gone(self._send(send), receive)
        finally:
            self._asked.order.cancel()
            self._asked.close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for line in self._lines:
                async with asyncio.timeout(_SEND_SECONDS):
                    await send({"type": "http.response.body", "body": line, "more_body": True})
        except (TimeoutError, OSError) as error:
            logger.info("a stream's reader is gone: %s", error or "it reads nothing")
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _lines(
    asked: Asked, first: tuple[int, Event], events: AsyncIterator[tuple[int, Event]]
) -> AsyncIterator[bytes]:
    """A stream's lines, with what went wrong where something did."""
    more: dict[str, object] = {"usage": None} if asked.includes_usage else {}
    begun: set[int] = set()
    tokens = 0
    async for number, event in _chained(first, events):
        if isinstance(event, Failed):
            failure = failure_of(event.error)
            if failure is None:
                logger.error("a text failed", exc_info=event.error)
            yield _line((failure or bug()).body())
            return
        if number not in begun:
            begun.add(number)
            opening = asked.shape.first(number)
            if opening is not None:
                yield _line(asked.shape.chunk([opening], **more))
        gathered = Gathered()
        gathered.add(event)
        tokens += gathered.count
        if gathered.reason is not None:
            yield _line(asked.shape.chunk([asked.shape.end(number, gathered.reason)], **more))
        elif gathered.text or gathered.tokens:
            yield _line(asked.shape.chunk([asked.shape.piece(number, gathered)], **more))
    if asked.includes_usage:
        yield _line(asked.shape.chunk([], usage=usage(asked.prompt_tokens, tokens)))
    yield b"data: [DONE]\n\n"


async def _chained(
    first: tuple[int, Event], events: AsyncIterator[tuple[int, Event]]
) -> AsyncIterator[tuple[int, Event]]:
    yield first
    async for event in events:
        yield event


def _line(content: object) -> bytes:
    return f"data: {dumps(content)}\n\n".encode("ascii")


async def _unless_gone(work: Awaitable[T], receive: Receive) -> T | None:
    """The result of `work`, or None if the asker hung up before; `work` is cancelled then."""
    working = asyncio.ensure_future(work)
    gone = asyncio.create_task(_hung_up(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
