"""Reads large frames of a stream straight into the memory that they stay in.

asyncio's StreamReader wakes whoever waits for a megabyte at every 32 kB that arrive, and copies each byte three times;
a round moves a hundred megabytes. Here the kernel writes into the frame, and its reader wakes once.
"""

from __future__ import annotations

import asyncio

from peers.errors import BadMessage

_SCRATCH_BYTES = 64 * 1024
_SMALL_BYTES = 4 * 1024  # a frame's head comes with what follows it: two reads instead of one for each few bytes
_MOST_STAGED_BYTES = 256 * 1024  # of what nobody has asked for yet


class BulkReader(asyncio.BufferedProtocol):
    """Takes the place of a stream's reader; `writer` stays as it is. One task reads at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, most_bytes: int) -> None:
        """`most_bytes` is the largest frame that anybody may claim to send."""
        self._most_bytes = most_bytes
        self._transport: asyncio.Transport = writer.transport  # type: ignore[assignment]  # a socket's
        self._below: asyncio.BaseProtocol = self._transport.get_protocol()  # the writer waits by it
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._staged = bytearray(reader._buffer)  # type: ignore[attr-defined]  # no public way to look without waiting
        self._frame: memoryview | None = None
        self._filled = 0
        self._waiter: asyncio.Future[None] | None = None
        self._ended = bool(reader._eof)  # type: ignore[attr-defined]
        self._error = reader.exception()
        self._paused = False
        if self._transport.is_closing():
            self._ended = True
            return
        self._transport.pause_reading()  # uvloop takes a protocol's way of reading when it starts to read
        self._transport.set_protocol(self)
        self._transport.resume_reading()

    async def readexactly(self, size: int) -> bytes | bytearray:
        """The next `size` bytes.

        Raises:
            BadMessage: more than a frame may have were asked for; nothing was read.
            asyncio.IncompleteReadError: the stream ended before.
            OSError: it broke.
        """
        if size > self._most_bytes:
            raise BadMessage(f"a hivemind frame claims {size} bytes; at most {self._most_bytes} are accepted")
        if self._waiter is not None:
            raise RuntimeError("two tasks read one stream")
        if len(self._staged) < size and size > _SMALL_BYTES:
            return await self._read_into(size)
        while len(self._staged) < size:
            if self._ended:
                rest = bytes(self._staged)
                self._staged.clear()
                raise self._end(rest, size)
            await self._wait()
        data = bytes(memoryview(self._staged)[:size])
        del self._staged[:size]
        self._go_on()
        return data

    async def _read_into(self, size: int) -> bytearray:
        whole = bytearray(size)
        self._filled, self._frame = len(self._staged), memoryview(whole)
        self._frame[: self._filled] = self._staged
        self._staged.clear()
        try:
            while self._filled < size:
                if self._ended:
                    raise self._end(bytes(self._frame[: self._filled]), size)
                await self._wait()
        except asyncio.CancelledError:
            self._staged[:0] = self._frame[: self._filled]  # for whoever asks next
            raise
        finally:
            self._frame = None
        return whole

    def _end(self, rest: bytes, size: int) -> Exception:
        return self._error or asyncio.IncompleteReadError(rest, size)

    async def _wait(self) -> None:
        self._go_on()
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _go_on(self) -> None:
        if self._paused and not self._ended and len(self._staged) <= _MOST_STAGED_BYTES:
            self._paused = False
            self._transport.resume_reading()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Of asyncio: where the next bytes go."""
        if self._frame is not None and self._filled < len(self._frame):
            return self._frame[self._filled :]
        return self._scratch

    def buffer_updated(self, nbytes: int) -> None:
        """Of asyncio: so many came."""
        if self._frame is not None and self._filled < len(self._frame):
            self._filled += nbytes
            if self._filled == len(self._frame):
                self._wake()
            return
        self._staged += self._scratch[:nbytes]
        self._wake()
        if len(self._staged) > _MOST_STAGED_BYTES and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        """Of asyncio: the other side says no more; this side may go on."""
        self._ended = True
        self._wake()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Of asyncio: both sides are over."""
        self._ended, self._error = True, exc
        self._wake()
        self._below.connection_lost(exc)

    def pause_writing(self) -> None:
        """Of asyncio: the writer must wait."""
        self._below.pause_writing()

    def resume_writing(self) -> None:
        """Of asyncio: the writer need not wait any more."""
        self._below.resume_writing()
