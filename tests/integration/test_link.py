"""The links that tests and benchmarks put between peers do what they say, also to real peers."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from peers.network import ByteStream
from tests.integration.peers.conftest import (
    Start,
    start,  # noqa: F401
)
from tests.integration.peers.echo_peer import echo as echo_frames
from tests.link import LOOPBACK, Link, LinkFailed, LinkProcess, LinkRules, free_port

Through = Callable[[Link], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
WAIT_SECONDS = 20.0


@pytest.fixture
async def echo_port() -> AsyncIterator[int]:
    """A server that sends back what it gets, and ends when the other side does."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(1 << 16):
            writer.write(chunk)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(echo, LOOPBACK, 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()


@pytest.fixture
async def through() -> AsyncIterator[Through]:
    """Starts a link and connects through it; both end after the test."""
    links: list[Link] = []

    async def connect(link: Link) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        links.append(link)
        return await asyncio.open_connection(LOOPBACK, await link.start())

    yield connect
    for link in links:
        await link.close()


async def seconds_of(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> float:
    """There and back."""
    began = time.perf_counter()
    writer.write(data)
    async with asyncio.timeout(WAIT_SECONDS):
        assert await reader.readexactly(len(data)) == data
    return time.perf_counter() - began


async def rest_of(reader: asyncio.StreamReader) -> bytes:
    """What comes before the end, in order or not."""
    try:
        return await reader.read(-1)
    except ConnectionError:
        return b""


async def test_bytes_arrive_intact_and_counted_after_the_delay(echo_port: int, through: Through) -> None:
    link = Link(echo_port, LinkRules(one_way_seconds=0.03))
    reader, writer = await through(link)
    data = os.urandom(1 << 20)
    assert await seconds_of(reader, writer, b"x") >= 0.06
    assert await seconds_of(reader, writer, data) >= 0.06
    count = link.count()
    assert (count.there_bytes, count.back_bytes, count.connections) == (len(data) + 1, len(data) + 1, 1)


async def test_many_small_messages_wait_for_the_delay_once_not_each(echo_port: int, through: Through) -> None:
    reader, writer = await through(Link(echo_port, LinkRules(one_way_seconds=0.2)))
    answers = asyncio.create_task(reader.readexactly(20))
    began = time.perf_counter()
    for _ in range(20):
        writer.write(b"x")
        await writer.drain()
    async with asyncio.timeout(WAIT_SECONDS):
        await answers
    assert 0.4 <= time.perf_counter() - began < 20 * 0.4


async def test_a_throttled_link_shares_its_rate_among_connections(echo_port: int, through: Through) -> None:
    link = Link(echo_port, LinkRules(bits_per_second=8e6))
    first = await through(link)
    second = await asyncio.open_connection(LOOPBACK, first[1].get_extra_info("peername")[1])
    data = os.urandom(100_000)
    both = await asyncio.gather(seconds_of(*first, data), seconds_of(*second, data))
    assert max(both) >= 0.2


async def test_an_end_passes_through_after_what_was_sent(echo_port: int, through: Through) -> None:
    reader, writer = await through(Link(echo_port, LinkRules(one_way_seconds=0.01)))
    data = os.urandom(1 << 20)
    writer.write(data)
    writer.write_eof()
    async with asyncio.timeout(WAIT_SECONDS):
        assert await reader.read(-1) == data


async def test_a_stalled_link_holds_back_and_a_cut_one_ends_both_sides(through: Through) -> None:
    ended: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        ended.set_result(await rest_of(reader))
        writer.close()

    server = await asyncio.start_server(listen, LOOPBACK, 0)
    link = Link(server.sockets[0].getsockname()[1])
    link.stall()
    reader, writer = await through(link)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await reader.readexactly(5)
    link.resume()
    async with asyncio.timeout(WAIT_SECONDS):
        assert await reader.readexactly(5) == b"hello"
        link.cut()
        assert await rest_of(reader) == b""
        await ended
        refused, _ = await asyncio.open_connection(LOOPBACK, writer.get_extra_info("peername")[1])
        assert await rest_of(refused) == b""
    server.close()


async def test_a_process_of_links_obeys_and_ends(echo_port: int) -> None:
    with LinkProcess() as links:
        port = links.open(echo_port, LinkRules(one_way_seconds=0.02))
        reader, writer = await asyncio.open_connection(LOOPBACK, port)
        assert await seconds_of(reader, writer, b"hello") >= 0.04
        links.set(port, LinkRules(one_way_seconds=0.1))
        assert await seconds_of(reader, writer, b"hello") >= 0.2
        assert links.count(port).there_bytes == 10
        with pytest.raises(LinkFailed, match="KeyError"):
            links.count(1)
        links.cut(port)
        writer.close()
    with pytest.raises(LinkFailed):
        links.open(echo_port)


async def test_peers_that_announce_a_link_are_reached_through_it_by_everybody(start: Start) -> None:  # noqa: F811
    """By who bootstraps from them, by who finds them by their id alone, and by those whom they themselves dial."""
    rules = LinkRules(one_way_seconds=0.03)
    with LinkProcess() as links:
        ports = {name: free_port() for name in ("ann", "bob")}
        fronts = {name: links.open(port, rules) for name, port in ports.items()}

        def behind(name: str) -> dict[str, object]:
            return {"port": ports[name], "announce": (f"/ip4/{LOOPBACK}/tcp/{fronts[name]}",)}

        ann = await start("ann", **behind("ann"))
        bob = await start("bob", ann, **behind("bob"))
        client = await start("client", ann, client_mode=True)
        for peer in (ann, bob):
            await peer.serve_stream("echo", echo_frames)
        for asker, asked in ((client, bob), (ann, bob), (bob, ann)):
            before = [links.count(front) for front in fronts.values()]
            stream = await asker.open_stream(asked.peer_id, "echo")
            assert await frame_seconds(stream, b"warm") >= 0.06
            assert await frame_seconds(stream, os.urandom(1 << 18)) >= 0.06
            after = [links.count(front) for front in fronts.values()]
            there = sum(b.there_bytes - a.there_bytes for a, b in zip(before, after, strict=True))
            back = sum(b.back_bytes - a.back_bytes for a, b in zip(before, after, strict=True))
            assert min(there, back) > 1 << 18


async def frame_seconds(stream: ByteStream, data: bytes) -> float:
    """There and back through a peer's echo."""
    began = time.perf_counter()
    stream.writer.write(len(data).to_bytes(4, "big") + data)
    async with asyncio.timeout(WAIT_SECONDS):
        await stream.writer.drain()
        size = int.from_bytes(await stream.reader.readexactly(4), "big")
        assert await stream.reader.readexactly(size) == data
    return time.perf_counter() - began


CONNECT = """
import socket, sys
peer = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
for line in sys.stdin:
    peer.settimeout(float(line))
    peer.sendall(b"x")
    try:
        print(peer.recv(1).decode(), flush=True)
    except TimeoutError:
        print("nothing", flush=True)
"""


class Dialler:
    """A process that dials a port; `ask` sends a byte and waits so many seconds for what comes back."""

    def __init__(self, port: int) -> None:
        command = [sys.executable, "-c", CONNECT, str(port)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    async def ask(self, seconds: float = WAIT_SECONDS) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        return (await asyncio.to_thread(self.process.stdout.readline)).strip()


@pytest.mark.parametrize("others", [False, True])
async def test_a_barred_link_holds_back_whom_it_shall_and_nobody_else(echo_port: int, others: bool) -> None:
    with LinkProcess() as links:
        port = links.open(echo_port)
        ann, bob = Dialler(port), Dialler(port)
        assert [await each.ask() for each in (ann, bob)] == ["x", "x"]
        links.bar(port, [ann.process.pid], others=others)
        barred, free = (bob, ann) if others else (ann, bob)
        assert await free.ask() == "x"
        assert await barred.ask(0.3) == "nothing"
        late = Dialler(port)  # one of the others, who comes while the bar stands
        assert await late.ask(0.3 if others else WAIT_SECONDS) == ("nothing" if others else "x")
        links.unbar(port)
        assert await barred.ask() == "x", "what was held back goes on, and the connection stood"
        for dialler in (ann, bob, late):
            dialler.process.communicate()
