"""A link between two peers: a TCP proxy that delays, throttles, stalls, cuts and counts what goes through it.

Put one in front of a peer's port and let the peer announce the link's port: others then dial it through the link. A
link forwards bytes as they are, so what runs over it is real. `LinkProcess` keeps links in a process of their own, so
that a busy test or benchmark does not add to their delay. This file is that process's program: standard library only.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

LOOPBACK = "127.0.0.1"
_CHUNK_BYTES = 64 << 10
_QUEUED_BYTES = 16 << 20  # under way in one direction of one connection before the sender has to wait
_STOP_SECONDS = 5.0


class LinkFailed(Exception):
    """A link cannot do what it was asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkRules:
    """What a link does to bytes: how long each takes one way, and how many go per second and direction (0: any)."""

    one_way_seconds: float = 0.0
    bits_per_second: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.one_way_seconds <= 60 or self.bits_per_second < 0:
            raise ValueError(f"a link of {self.one_way_seconds} s and {self.bits_per_second} bit/s cannot be made")


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkCount:
    """Bytes that were taken in, towards the peer behind the link and back from it, and connections ever made."""

    there_bytes: int
    back_bytes: int
    connections: int


class _Lane:
    """One direction of a link; its connections share the rate."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._free_at = 0.0

    def due(self, size: int, now: float, rules: LinkRules) -> float:
        """When the last of `size` bytes that came in `now` goes out at the other end."""
        self.num_bytes += size
        sent_at = max(now, self._free_at)
        if rules.bits_per_second:
            sent_at += size * 8 / rules.bits_per_second
        self._free_at = sent_at
        return sent_at + rules.one_way_seconds


class _Pipe:
    """One direction of one connection: read at once, written when due, in order."""

    def __init__(
        self, link: Link, lane: _Lane, gate: asyncio.Event, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._link, self._lane, self._gate, self._reader, self._writer = link, lane, gate, reader, writer
        self._queue: deque[tuple[float, bytes | None]] = deque()
        self._queued_bytes = 0
        self._changed = asyncio.Event()

    async def run(self) -> bool:
        """Until the sender has ended; False when it broke off instead."""
        reading = asyncio.create_task(self._read())
        try:
            return await self._write()
        finally:
            reading.cancel()
            await asyncio.wait([reading])

    async def _read(self) -> None:
        while True:
            try:
                chunk: bytes | None = await self._reader.read(_CHUNK_BYTES)
            except OSError:
                chunk = None
            now = asyncio.get_running_loop().time()
            self._queue.append((self._lane.due(len(chunk or b""), now, self._link.rules), chunk))
            self._queued_bytes += len(chunk or b"")
            self._changed.set()
            if not chunk:
                return
            while self._queued_bytes > _QUEUED_BYTES:
                await self._wait_for_change()

    async def _write(self) -> bool:
        loop = asyncio.get_running_loop()
        while True:
            while not self._queue:
                await self._wait_for_change()
            due, chunk = self._queue.popleft()
            if (left := due - loop.time()) > 0:
                await asyncio.sleep(left)
            await self._link.running.wait()
            await self._gate.wait()
            if chunk is None:
                return False
            try:
                if not chunk:
                    self._writer.write_eof()
                    return True
                self._writer.write(chunk)
                await self._writer.drain()
            except OSError:
                return False
            self._queued_bytes -= len(chunk)
            self._changed.set()

    async def _wait_for_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


@dataclass(frozen=True, slots=True)
class _Bar:
    """Whose connections are held back: those that these processes have dialled, or those of all others."""

    pids: frozenset[int]
    others: bool

    def sockets(self) -> frozenset[str]:
        """The sockets that the processes have open now, by inode."""
        found = set()
        for pid in self.pids:
            with suppress(OSError):  # it has ended, or closed one just now
                for entry in os.scandir(f"/proc/{pid}/fd"):
                    name = os.readlink(entry.path)
                    if name.startswith("socket:["):
                        found.add(name[8:-1])
        return frozenset(found)

    def holds(self, port: int, owned: Collection[str]) -> bool:
        """Whether a connection from `port` of this machine is held back; `owned` is what `sockets` found."""
        rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
        ours = any(row[1] == f"0100007F:{port:04X}" and row[9] in owned for row in rows)
        return ours != self.others


class Link:
    """One port of this machine that leads to another through `rules`, which may be changed at any time."""

    def __init__(self, to_port: int, rules: LinkRules | None = None, *, to_host: str = LOOPBACK) -> None:
        self.rules = rules or LinkRules()
        self.running = asyncio.Event()
        self.running.set()
        self._to = (to_host, to_port)
        self._there, self._back = _Lane(), _Lane()
        self._server: asyncio.Server | None = None
        self._pipes: set[asyncio.Task[bool]] = set()
        self._ends: set[asyncio.Task[None]] = set()
        self._connections = 0
        self._is_cut = False
        self._bar: _Bar | None = None
        self._gates: dict[asyncio.Event, int] = {}  # of each connection, by the port from which it was dialled

    async def start(self, port: int = 0) -> int:
        """Listen; gives the port."""
        self._server = await asyncio.start_server(self._accept, LOOPBACK, port)
        return int(self._server.sockets[0].getsockname()[1])

    def count(self) -> LinkCount:
        """What went through so far."""
        there, back = self._there.num_bytes, self._back.num_bytes
        return LinkCount(there_bytes=there, back_bytes=back, connections=self._connections)

    def stall(self) -> None:
        """Hold everything back; connections stand."""
        self.running.clear()

    def resume(self) -> None:
        """Let go of what was held back."""
        self.running.set()

    def cut(self) -> None:
        """End every connection at both ends, and refuse new ones until `mend`."""
        self._is_cut = True
        for pipe in self._pipes:
            pipe.cancel()

    def mend(self) -> None:
        """Take connections again."""
        self._is_cut = False

    def bar(self, pids: Collection[int], *, others: bool) -> None:
        """Hold back what was dialled by these processes, or by any `others`, now and later; connections stand."""
        self._bar = _Bar(frozenset(pids), others)
        owned = self._bar.sockets()
        for gate, port in self._gates.items():
            if self._bar.holds(port, owned):
                gate.clear()

    def unbar(self) -> None:
        """Let go of what was held back."""
        self._bar = None
        for gate in self._gates:
            gate.set()

    async def close(self) -> None:
        """End every connection and stop listening."""
        self.cut()
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
        await asyncio.gather(*self._ends)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._connect(reader, writer))
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._to)
        except OSError:
            writer.transport.abort()
            return
        self._connections += 1
        gate, dialled_from = asyncio.Event(), int(writer.get_extra_info("peername")[1])
        self._gates[gate] = dialled_from
        if self._bar is None or not self._bar.holds(dialled_from, self._bar.sockets()):
            gate.set()
        pipes = {
            asyncio.create_task(_Pipe(self, self._there, gate, reader, far_writer).run()),
            asyncio.create_task(_Pipe(self, self._back, gate, far_reader, writer).run()),
        }
        self._pipes |= pipes
        left = set(pipes)
        try:
            while left:
                done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
                if any(pipe.cancelled() or not pipe.result() for pipe in done):
                    for end in (writer, far_writer):
                        end.transport.abort()
                    break
        finally:
            del self._gates[gate]
            self._pipes -= pipes
            for pipe in left:
                pipe.cancel()
            for end in (writer, far_writer):
                end.close()  # what is written goes out first, unless it was aborted


class LinkProcess:
    """Links in a process of their own, by the port on which they listen; a context manager that ends it.

    Every call raises LinkFailed when the process says no or is gone.
    """

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).resolve())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    @property
    def pid(self) -> int:
        return self._process.pid

    def open(self, to_port: int, rules: LinkRules | None = None) -> int:
        """A new link to a port of this machine; gives the port to dial instead."""
        return int(str(self._ask("open", to_port=to_port, **asdict(rules or LinkRules()))["port"]))

    def set(self, port: int, rules: LinkRules) -> None:
        """Change what a link does from now on."""
        self._ask("set", port=port, **asdict(rules))

    def count(self, port: int) -> LinkCount:
        """What went through a link so far."""
        found = self._ask("count", port=port)
        return LinkCount(**{key: int(str(value)) for key, value in found.items()})

    def cut(self, port: int) -> None:
        """See Link."""
        self._ask("cut", port=port)

    def mend(self, port: int) -> None:
        """See Link."""
        self._ask("mend", port=port)

    def bar(self, port: int, pids: Collection[int], *, others: bool = False) -> None:
        """See Link."""
        self._ask("bar", port=port, pids=list(pids), others=others)

    def unbar(self, port: int) -> None:
        """See Link."""
        self._ask("unbar", port=port)

    def close(self) -> None:
        """End the process and all its links."""
        if self._process.stdin is not None:
            self._process.stdin.close()  # it ends by itself when nobody can ask it any more
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> LinkProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, what: str, **values: object) -> dict[str, object]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"what": what, **values}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except (OSError, ValueError) as error:  # ValueError: closed here
            raise LinkFailed(f"the process of the links is gone: {error}") from error
        answer: dict[str, object] = json.loads(line) if line else {"error": "the process of the links is gone"}
        if "error" in answer:
            raise LinkFailed(str(answer["error"]))
        return answer


def free_port() -> int:
    """A TCP port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


async def _obey(links: dict[int, Link], order: dict[str, object]) -> dict[str, object]:
    """One order to a process of links."""
    what, pids, others = order.pop("what"), order.pop("pids", []), order.pop("others", False)
    number = {key: float(str(value)) for key, value in order.items()}
    rules = LinkRules(**{key: number[key] for key in ("one_way_seconds", "bits_per_second") if key in number})
    if what == "open":
        link = Link(int(number["to_port"]), rules)
        port = await link.start()
        links[port] = link
        return {"port": port}
    link = links[int(number["port"])]
    match what:
        case "set":
            link.rules = rules
        case "count":
            return asdict(link.count())
        case "cut":
            link.cut()
        case "mend":
            link.mend()
        case "bar":
            assert isinstance(pids, list)
            link.bar(pids, others=bool(others))
        case "unbar":
            link.unbar()
        case _:
            raise ValueError(f"links cannot {what}")
    return {}


async def _serve() -> None:
    """Obey orders from stdin, one JSON object a line, until it ends."""
    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    links: dict[int, Link] = {}
    while line := await orders.readline():
        try:
            answer = await _obey(links, json.loads(line))
        except (OSError, ValueError, KeyError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for link in links.values():
        await link.close()


if __name__ == "__main__":
    asyncio.run(_serve())
