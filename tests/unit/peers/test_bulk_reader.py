"""Frames come whole and in order however the bytes arrive, and nothing piles up that nobody reads."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Callable

import pytest
import uvloop

from peers.errors import BadMessage
from peers.streams.bulk_reader import BulkReader

MOST = 1 << 20
SIZES = (1, 8, 9, 4096, 4097, 65_536, 65_537, 300_000, 0, MOST)


class Line:
    """The two ends of a stream: who writes by hand, and who reads frames."""

    def __init__(self, near: socket.socket, reader: BulkReader, writer: asyncio.StreamWriter) -> None:
        self.near, self.reader, self.writer = near, reader, writer

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.near, data)

    def end(self) -> None:
        self.near.shutdown(socket.SHUT_WR)


async def open_line(early: bytes = b"") -> Line:
    near, far = socket.socketpair()
    near.setblocking(False)
    reader, writer = await asyncio.open_unix_connection(sock=far)
    if early:
        reader.feed_data(early)
    return Line(near, BulkReader(reader, writer, most_bytes=MOST), writer)


@pytest.fixture
async def line() -> AsyncIterator[Line]:
    found = await open_line()
    yield found
    found.writer.close()
    found.near.close()


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_frames_come_whole_and_in_order(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    dice = random.Random(7)
    frames = [dice.randbytes(size) for size in (*dice.choices(SIZES[:-1], k=60), MOST)]

    async def main() -> None:
        found = await open_line(early=frames[0][:1])

        async def give() -> None:
            rest = b"".join(frames)[1:]
            while rest:
                size = dice.choice((1, 7, 5_000, 70_000, 200_000))
                await found.send(rest[:size])
                rest = rest[size:]

        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            tasks.create_task(give())
            for frame in frames:
                assert await found.reader.readexactly(len(frame)) == frame
        found.writer.close()
        await found.writer.wait_closed()
        found.near.close()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())


@pytest.mark.parametrize("size", [100, 100_000])
async def test_a_stream_that_ends_within_a_frame_says_what_came(line: Line, size: int) -> None:
    await line.send(b"x" * (size - 1))
    line.end()
    async with asyncio.timeout(20):
        with pytest.raises(asyncio.IncompleteReadError) as caught:
            await line.reader.readexactly(size)
        assert (len(caught.value.partial), caught.value.expected) == (size - 1, size)
        with pytest.raises(asyncio.IncompleteReadError):
            await line.reader.readexactly(1)


async def test_after_its_end_the_other_way_is_still_open(line: Line) -> None:
    line.end()
    async with asyncio.timeout(20):
        with pytest.raises(asyncio.IncompleteReadError):
            await line.reader.readexactly(1)
        line.writer.write(b"still here")
        await line.writer.drain()
        assert await asyncio.get_running_loop().sock_recv(line.near, 100) == b"still here"


async def test_a_frame_that_claims_too_much_is_refused_and_nothing_is_read(line: Line) -> None:
    await line.send(b"12345678")
    async with asyncio.timeout(20):
        with pytest.raises(BadMessage, match=f"claims {MOST + 1} bytes; at most {MOST}"):
            await line.reader.readexactly(MOST + 1)
        assert await line.reader.readexactly(8) == b"12345678"


@pytest.mark.parametrize("size", [4000, 100_000])
async def test_who_stops_waiting_loses_nothing(line: Line, size: int) -> None:
    data = random.Random(1).randbytes(size)
    await line.send(data[: size // 2])
    async with asyncio.timeout(20):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await line.reader.readexactly(size)
        await line.send(data[size // 2 :])
        assert await line.reader.readexactly(size) == data


async def test_what_nobody_reads_stays_with_its_sender(line: Line) -> None:
    data = random.Random(2).randbytes(8 * MOST)
    giving = asyncio.create_task(line.send(data))
    done, _ = await asyncio.wait([giving], timeout=0.5)
    assert not done, "8 MB went nowhere"
    async with asyncio.timeout(20):
        for start in range(0, len(data), MOST):
            assert await line.reader.readexactly(MOST) == data[start : start + MOST]
        await giving


async def test_a_writer_waits_while_the_other_side_does_not_read(line: Line) -> None:
    data = bytes(8 * MOST)
    line.writer.write(data)
    draining = asyncio.create_task(line.writer.drain())
    done, _ = await asyncio.wait([draining], timeout=0.2)
    assert not done
    async with asyncio.timeout(20):
        left = len(data)
        while left:
            left -= len(await asyncio.get_running_loop().sock_recv(line.near, MOST))
        await draining


async def test_a_stream_that_breaks_wakes_who_waits(line: Line) -> None:
    reading = asyncio.create_task(line.reader.readexactly(100_000))
    await asyncio.sleep(0)
    line.writer.transport.abort()
    async with asyncio.timeout(20):
        with pytest.raises((asyncio.IncompleteReadError, OSError)):
            await reading
