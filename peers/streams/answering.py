"""The answering side of streams: greet, parse, hand to a handler, and turn what goes wrong into a refusal.

A bad request ends in a sentence to whoever sent it; a bad frame ends its stream; neither ends the peer.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from blocks.errors import BadAdapter, BadSession, BadSpan, BlockError, Busy, CacheFull
from peers.errors import BadMessage, Refused, StreamClosed
from peers.network import ByteStream, PeerId
from peers.streams.calls import HELLO_SECONDS, Answer, Question, check_tensors, hello_refusal
from peers.streams.fields import to_body
from peers.streams.messages import Hello, Message, Refusal, RefusalCode, is_kind, parse_message
from peers.streams.traffic import Traffic
from peers.streams.wire import Frame, read_frame, sent_bytes, write_frame
from peers.streams.wire_format import WireFormat

logger = logging.getLogger(__name__)

MAX_IN_FLIGHT = 256  # questions of one stream at a time; the next is read when one is answered
MAX_IN_FLIGHT_BYTES = 256 << 20  # likewise, of their tensors
_DRAIN_SECONDS = 2.0
_DRAIN_BYTES = 1 << 16

_CODES: dict[type[Exception], RefusalCode] = {
    BadSession: RefusalCode.SESSION,
    Busy: RefusalCode.BUSY,
    CacheFull: RefusalCode.FULL,
    BadSpan: RefusalCode.SPAN,
    BadAdapter: RefusalCode.MALFORMED,
}


class Handler(Protocol):
    """Serves one kind of stream. Expected refusals are raised: Refused, BadMessage or an error of `blocks`."""

    async def answer(self, question: Question) -> Answer:
        """Answer one question; several of one stream run at the same time."""

    async def stream_closed(self, peer: PeerId, stream: int) -> None:
        """The asker is gone: free what was kept for it."""


class CallServer:
    """Answers the streams of one kind."""

    def __init__(self, hello: Callable[[], Hello], handler: Handler, traffic: Traffic) -> None:
        self.handler = handler
        """Who answers; it may change, and what streams that are open ask goes to the new one."""
        self._hello, self._traffic = hello, traffic
        self._streams = itertools.count(1)

    async def serve(self, stream: ByteStream) -> None:
        """Read questions until the other side closes or breaks the rules."""
        number = next(self._streams)
        lock = asyncio.Lock()
        try:
            if not await self._greet(stream, lock):
                return
            async with asyncio.TaskGroup() as tasks:
                running: dict[asyncio.Task[None], int] = {}
                while True:
                    try:
                        frame = await read_frame(stream.reader)
                    except StreamClosed:
                        break
                    except BadMessage as error:
                        logger.warning("stream refused peer=%s reason=%s", stream.peer, error)
                        await self._say_why(stream, lock, error)
                        break
                    task = tasks.create_task(self._answer_one(stream, lock, number, frame))
                    running[task] = frame.num_bytes
                    task.add_done_callback(running.pop)
                    del frame, task  # else the last question's tensors stay until the next one comes
                    while len(running) >= MAX_IN_FLIGHT or sum(running.values()) >= MAX_IN_FLIGHT_BYTES:
                        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in running:  # the asker is gone: nobody waits for these
                    task.cancel()
        finally:
            await self.handler.stream_closed(stream.peer, number)

    async def _say_why(self, stream: ByteStream, lock: asyncio.Lock, error: BadMessage) -> None:
        """Tell the other side why its stream ends, if it listens."""
        with suppress(StreamClosed, TimeoutError):
            async with asyncio.timeout(HELLO_SECONDS):
                sent = await _send(stream, lock, 0, Answer(message=_refusal(error)))
                self._traffic.add(stream.peer, "malformed", sent=sent)
        await _drain(stream)

    async def _greet(self, stream: ByteStream, lock: asyncio.Lock) -> bool:
        ours = self._hello()
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                frame = await read_frame(stream.reader, max_payload=0)
            self._traffic.add(stream.peer, ours.kind, received=frame.wire_bytes)
            theirs = parse_message(frame.kind, frame.body)
            refusal = hello_refusal(ours, theirs)
        except (BadMessage, TimeoutError) as error:
            refusal = Refusal(code=RefusalCode.MALFORMED, reason=str(error) or "no hello came in time")
        except StreamClosed:
            return False
        answer: Message = refusal or ours
        try:
            self._traffic.add(stream.peer, ours.kind, sent=await _send(stream, lock, 0, Answer(message=answer)))
        except StreamClosed:
            return False
        if refusal is not None:
            await _drain(stream)
        return refusal is None

    async def _answer_one(self, stream: ByteStream, lock: asyncio.Lock, number: int, frame: Frame) -> None:
        # Only known kinds are counted, else an asker could make the counters grow.
        kind = frame.kind if is_kind(frame.kind) else "malformed"
        self._traffic.add(stream.peer, kind, received=frame.wire_bytes)
        try:
            message = parse_message(frame.kind, frame.body)
            await check_tensors(frame.tensors)
            question = Question(
                peer=stream.peer, stream=number, message=message, tensors=frame.tensors, wire=frame.wire
            )
            answer = await self.handler.answer(question)
        except (BadMessage, Refused, BlockError) as error:
            logger.info("refused peer=%s kind=%r reason=%s", stream.peer, frame.kind, error)
            answer = Answer(message=_refusal(error))
        except Exception:
            # An outer edge: one bad request must not end the peer; the traceback is ours, the asker gets a sentence.
            logger.exception("request failed peer=%s kind=%s", stream.peer, frame.kind)
            answer = Answer(message=Refusal(code=RefusalCode.INTERNAL, reason=f"{frame.kind} failed on this host"))
        try:
            await self._traffic.limit.take(sent_bytes(answer.tensors, frame.wire))
            sent = await _send_fitting(stream, lock, frame, answer)
        except StreamClosed:
            return
        self._traffic.add(stream.peer, kind, sent=sent)


async def _drain(stream: ByteStream) -> None:
    """Read on until the other side ends the stream, for a bounded time.

    p2pd resets a stream that is closed with data unread, and what was said last would be lost with it.
    """
    with suppress(OSError):  # the time is up, or the other side is gone
        async with asyncio.timeout(_DRAIN_SECONDS):
            while await stream.reader.read(_DRAIN_BYTES):
                pass


async def _send(
    stream: ByteStream, lock: asyncio.Lock, request: int, answer: Answer, wire: WireFormat | None = None
) -> int:
    frame = Frame(
        request=request, kind=answer.message.kind, body=to_body(answer.message), tensors=answer.tensors, wire=wire
    )
    async with lock:
        return await write_frame(stream.writer, frame)


async def _send_fitting(stream: ByteStream, lock: asyncio.Lock, question: Frame, answer: Answer) -> int:
    """Send an answer, or say that it cannot be sent."""
    try:
        return await _send(stream, lock, question.request, answer, question.wire)
    except BadMessage as error:
        logger.warning("answer not sent peer=%s kind=%s reason=%s", stream.peer, answer.message.kind, error)
        return await _send(stream, lock, question.request, Answer(message=_refusal(error)))


def as_refused(error: BadMessage | BlockError) -> Refused:
    """What went wrong in answering, as the refusal that the asker gets."""
    return Refused(str(error), _CODES.get(type(error), RefusalCode.MALFORMED))


def _refusal(error: BadMessage | Refused | BlockError) -> Refusal:
    refused = error if isinstance(error, Refused) else as_refused(error)
    return Refusal(code=refused.code, reason=str(refused))
