"""Questions and answers over one kept-open stream: many at a time, joined by number, each under a deadline.

A stream is far cheaper than a call of its own per step; so each pair of peers keeps one per kind. This is the asking
side; `answering.py` is the other.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from peers.errors import BadMessage, NetworkFailed, OverLimit, Refused, StreamClosed
from peers.network import ByteStream, Network, PeerId
from peers.streams.fields import to_body
from peers.streams.messages import Done, Hello, Message, Refusal, RefusalCode, common_version, parse_message
from peers.streams.traffic import Traffic
from peers.streams.wire import OFF_LOOP_BYTES, Frame, check_finite, read_frame, sent_bytes, write_frame
from peers.streams.wire_format import WireFormat

HELLO_SECONDS = 10.0
_REST_SECONDS = 1.0  # for the rest of a message whose sender waits no more


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One parsed request, who asks by transport identity, and on which stream.

    `wire` is the format in which its float tensors came; the answer's go back in it, and work that is passed on to
    other peers should go in it too.
    """

    peer: PeerId
    stream: int
    message: Message
    tensors: tuple[torch.Tensor, ...] = ()
    wire: WireFormat | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A reply and its tensors."""

    message: Message = field(default_factory=Done)
    tensors: tuple[torch.Tensor, ...] = ()


async def check_tensors(tensors: Sequence[torch.Tensor]) -> None:
    """Refuse values that are not finite, off the loop where they are many."""
    if sum(t.numel() * t.element_size() for t in tensors) > OFF_LOOP_BYTES:
        await asyncio.to_thread(check_finite, tensors)
    else:
        check_finite(tensors)


def hello_refusal(ours: Hello, theirs: Message) -> Refusal | None:
    """Why two peers cannot work together, or None."""
    if not isinstance(theirs, Hello):
        return Refusal(code=RefusalCode.MALFORMED, reason="the first message on a stream must be a hello")
    if theirs.run != ours.run:
        return Refusal(code=RefusalCode.RUN, reason=f"this peer serves run {ours.run}, not {theirs.run}")
    if common_version(ours, theirs) is None:
        reason = (
            f"this peer speaks protocol {ours.low} to {ours.high} ({ours.software}), the other "
            f"{theirs.low} to {theirs.high} ({theirs.software}); update the older one"
        )
        return Refusal(code=RefusalCode.VERSION, reason=reason)
    return None


class Caller:
    """The asking side of one stream. Made by `dial`; owned by whoever closes it."""

    def __init__(self, stream: ByteStream, traffic: Traffic) -> None:
        self.peer = stream.peer
        self.theirs: Hello | None = None
        self.is_closed = False
        self._stream, self._traffic = stream, traffic
        self._lock = asyncio.Lock()
        self._requests = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Frame]] = {}
        self._reader: asyncio.Task[None] | None = None

    async def greet(self, ours: Hello) -> None:
        """Exchange hellos, then begin to read answers.

        Raises:
            Refused: the other peer serves another run or speaks no common version.
            StreamClosed, TimeoutError: it is gone or does not answer.
        """
        frame = Frame(request=0, kind=ours.kind, body=to_body(ours))
        sent = await write_frame(self._stream.writer, frame)
        self._traffic.add(self.peer, ours.kind, sent=sent)
        async with asyncio.timeout(HELLO_SECONDS):
            reply = await read_frame(self._stream.reader, max_payload=0)
        self._traffic.add(self.peer, ours.kind, received=reply.wire_bytes)
        theirs = parse_message(reply.kind, reply.body)
        if isinstance(theirs, Refusal):
            raise Refused(theirs.reason, theirs.code)
        refusal = hello_refusal(ours, theirs)
        if refusal is not None or not isinstance(theirs, Hello):
            code = refusal.code if refusal else RefusalCode.MALFORMED
            raise Refused(refusal.reason if refusal else "no hello came", code)
        self.theirs = theirs
        self._reader = asyncio.create_task(self._read())

    async def call(
        self,
        message: Message,
        tensors: Sequence[torch.Tensor] = (),
        *,
        seconds: float,
        wire: WireFormat | None = None,
    ) -> Answer:
        """Ask and wait for the answer. Float tensors of both travel in the format `wire`; None: as they are.

        Raises:
            Refused: the other peer says no, with a code and a reason; or this message cannot be sent to anybody, or not
                in time under this peer's own limit.
            StreamClosed: the stream ended before the answer.
            BadMessage: the answer is malformed or not finite.
            TimeoutError: no answer within `seconds`.
        """
        if self.is_closed:
            raise StreamClosed(f"the stream to {self.peer} is closed")
        request = next(self._requests)
        future: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, if only the writing failed
        self._waiting[request] = future
        frame = Frame(request=request, kind=message.kind, body=to_body(message), tensors=tuple(tensors), wire=wire)
        try:
            async with asyncio.timeout(seconds):
                # Not under the lock, so that what is small goes first; and said now, lest the other peer seem late.
                await self._traffic.limit.take(sent_bytes(tensors, wire), seconds=seconds)
                async with self._lock:
                    sent = await self._write(frame)
                self._traffic.add(self.peer, message.kind, sent=sent)
                reply = await future
        except OverLimit as error:
            raise Refused(str(error), RefusalCode.BUSY) from error
        finally:
            self._waiting.pop(request, None)
        self._traffic.add(self.peer, message.kind, received=reply.wire_bytes)
        answer = parse_message(reply.kind, reply.body)
        if isinstance(answer, Refusal):
            raise Refused(answer.reason, answer.code)
        await check_tensors(reply.tensors)
        return Answer(message=answer, tensors=reply.tensors)

    async def _write(self, frame: Frame) -> int:
        if self.is_closed:
            raise StreamClosed(f"the stream to {self.peer} is closed")
        writing = asyncio.ensure_future(write_frame(self._stream.writer, frame))
        try:
            return await asyncio.shield(writing)
        except BadMessage as error:  # nothing was sent, and another peer would not take it either
            raise Refused(str(error), RefusalCode.MALFORMED) from error
        except asyncio.CancelledError:
            # Half a frame may be out: whatever came after it would be read as its rest. Others use this stream, so the
            # rest gets a moment, under the lock.
            try:
                await asyncio.wait({writing}, timeout=_REST_SECONDS)
            finally:
                if not writing.done():
                    writing.cancel()
                    self._end("a message was cut off")
                elif not writing.cancelled():
                    writing.exception()  # seen: nobody waits for it any more
            raise

    async def close(self) -> None:
        """Close the stream and fail whoever still waits."""
        self._end("closed here")
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait([self._reader])

    async def _read(self) -> None:
        try:
            while True:
                frame = await read_frame(self._stream.reader)
                future = self._waiting.pop(frame.request, None)
                if future is not None and not future.done():
                    future.set_result(frame)
        except (StreamClosed, BadMessage) as error:
            self._end(str(error))
        finally:
            self._end("nobody reads it any more")

    def _end(self, reason: str) -> None:
        self.is_closed = True
        self._stream.writer.close()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(StreamClosed(f"stream to {self.peer}: {reason}"))
        self._waiting.clear()


async def dial(network: Network, peer: PeerId, kind: str, hello: Hello, traffic: Traffic) -> Caller:
    """Open a stream of `kind` to `peer` and exchange hellos.

    Raises:
        NetworkFailed: it cannot be reached or does not answer the hello.
        Refused: it serves another run or speaks no common version.
    """
    stream = await network.open_stream(peer, kind)
    caller = Caller(stream, traffic)
    try:
        await caller.greet(hello)
    except (StreamClosed, BadMessage, TimeoutError) as error:
        await caller.close()
        raise NetworkFailed(
            f"peer {peer} did not answer the hello on '{kind}': {error or 'no answer in time'}"
        ) from error
    except BaseException:
        await caller.close()
        raise
    return caller


def hello_maker(run: str, software: str, clock: Callable[[], float] = time.time) -> Callable[[], Hello]:
    """A source of hellos with the present time."""
    return lambda: Hello(run=run, software=software, unix_seconds=clock())
