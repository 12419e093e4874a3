"""hivemind's P2P with four things changed: how p2pd is launched, how it ends, how large a frame may be, and who passes.

p2pd is started through a few lines of Python that ask the kernel to kill it when this process ends (Linux), because
its idle timeout alone leaves it, and its address in the DHT, behind for that long after a `kill -9`. Bootstrap peers
are not passed to it: p2pd would exit when none of them answers, and peers that start together need to try again.
The kernel means the thread that started it: p2pd also ends with the event loop's thread, not only with the process.
It has a process group of its own, as Ctrl-C in a terminal goes to a whole group, and this peer ends p2pd itself, after
its goodbye. It has no session of its own: Linux weighs sessions against each other (autogroups), p2pd and its peer then
wake each other for less, and each byte costs p2pd twice the CPU.

In a private run the `gate` is asked before any call, in either direction: there is no other way through this class.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import hivemind.hivemind_cli
from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.p2p.p2p_daemon_bindings import p2pclient
from hivemind.p2p.p2p_daemon_bindings.utils import (
    P2PDaemonError,
    P2PHandlerError,
    raise_if_failed,
    read_pbmsg_safe,
    write_pbmsg,
)
from hivemind.proto import p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr

from peers.child_process import ended, spawn
from peers.config import NetworkConfig
from peers.errors import NOT_ADMITTED, NetworkFailed, NotAdmitted
from peers.network import PeerId
from peers.private.gate import Gate
from peers.socket_directory import SocketDirectory
from peers.streams.bulk_reader import BulkReader

logger = logging.getLogger(__name__)

MAX_HIVEMIND_FRAME_BYTES = 16 * 1024 * 1024
_IDLE_SECONDS = 10  # for systems without a parent-death signal: p2pd's own timeout after its last client is gone
_DAEMON_START_SECONDS = 15.0
_STOP_SECONDS = 3.0
REFUSAL_SECONDS = 2.0  # for a peer that is not let in to take the reason
_READ_OUT_BYTES = 1 << 16
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
os.setpgid(0, 0)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""

_LOG_TIME = re.compile(r"^\d{4}/\d\d/\d\d \d\d:\d\d:\d\d ")  # of Go
StreamCallback = Callable[[Any, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
RefuseCallback = Callable[[NotAdmitted, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class _GateShut(NotAdmitted, P2PDaemonError):  # type: ignore[misc]
    """For hivemind, and for whoever calls through it, a peer that is not let in is one that cannot be reached."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DaemonOptions:
    """What a p2pd is started with. Listens nowhere when `listen` is empty."""

    listen: tuple[str, ...]
    announce: tuple[str, ...] = ()
    relays: tuple[str, ...] = ()
    use_relay: bool = False
    dht_client: bool = False
    identity_path: Path | None = None


def options_of(config: NetworkConfig, identity_path: Path, bootstrap: tuple[str, ...]) -> DaemonOptions:
    """The daemon options of a peer."""
    version = "ip6" if ":" in config.host else "ip4"
    return DaemonOptions(
        listen=() if config.client_mode else (f"/{version}/{config.host}/tcp/{config.port}",),
        announce=config.announce,
        relays=bootstrap if config.use_relay else (),
        use_relay=config.use_relay,
        dht_client=config.client_mode,
        identity_path=identity_path,
    )


class Daemon(P2P):  # type: ignore[misc]
    """One p2pd and the connection to it. hivemind's own RPC works on it, with frames capped."""

    gate: Gate | None = None  # of a private run; set before anything is served or called
    _child: Any
    _directory: SocketDirectory
    _last_lines: deque[str]

    @classmethod
    async def launch(cls, options: DaemonOptions) -> Daemon:
        """Start p2pd and wait until it listens.

        Raises:
            NetworkFailed: it exited, or did not answer within 15 s; the message carries its last line.
        """
        self = cls()
        self._directory = SocketDirectory.create()  # whoever reaches the sockets in it is this peer
        self._daemon_listen_maddr = Multiaddr(f"/unix{self._directory.path}/p2pd.sock")
        self._client_listen_maddr = Multiaddr(f"/unix{self._directory.path}/client.sock")
        self._last_lines = deque(maxlen=5)
        try:
            async with asyncio.timeout(_DAEMON_START_SECONDS):
                await self._spawn(options)
                self._client = await p2pclient.Client.create(self._daemon_listen_maddr, self._client_listen_maddr)
                await self._ping_daemon()
        except (OSError, TimeoutError, P2PDaemonError) as error:
            await self.shutdown()
            detail = " / ".join(_LOG_TIME.sub("", line) for line in self._last_lines) or str(error) or "no answer"
            raise NetworkFailed(f"p2pd did not start: {detail[-400:]}; check --host and --announce") from error
        except BaseException:
            await self.shutdown()
            raise
        return self

    async def _spawn(self, options: DaemonOptions) -> None:
        with as_file(files(hivemind.hivemind_cli) / "p2pd") as binary:
            self._child = await spawn(
                *(sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid())),
                *(str(binary), *_flags(options, self._daemon_listen_maddr)),
            )
        self._alive = True
        ready = asyncio.get_running_loop().create_future()
        self._reader_task = asyncio.create_task(self._drain_output(ready))
        await ready

    async def _drain_output(self, ready: asyncio.Future[None]) -> None:
        """Read all that p2pd says, so that its pipe never fills; nothing above debug, as go-libp2p is chatty."""
        rest = b""
        output: asyncio.StreamReader = self._child.stdout
        while chunk := await output.read(4096):
            *lines, rest = (rest + chunk)[-65536:].split(b"\n")
            for line in lines:
                text = line.decode(errors="replace").strip()
                logger.debug("p2pd says %s", text)
                self._last_lines.append(text)
                if text.startswith("Peer ID:") and not ready.done():
                    ready.set_result(None)
        if not ready.done():
            ready.set_exception(P2PDaemonError("exited"))

    async def add_binary_stream_handler(self, name: str, handler: StreamCallback, balanced: bool = False) -> None:
        """As hivemind's, for hivemind's own handlers: only members pass; frames are capped, and read in one go."""

        async def bulk(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await self._let_in(info.peer_id, name, writer)
            except NotAdmitted as error:
                await _say_no(error, reader, writer)
            else:
                await handler(info, _bulk(reader, writer), writer)  # type: ignore[arg-type]

        await super().add_binary_stream_handler(name, bulk, balanced)

    async def _add_protobuf_unary_handler(
        self, handle_name: str, handler: Any, input_protobuf_type: Any, balanced: bool = False
    ) -> None:
        """As hivemind's: only members pass. hivemind tells the caller what the error's `repr` says."""

        async def gated(request: Any, context: P2PContext) -> Any:
            await self._let_in(context.remote_id, handle_name)
            return await handler(request, context)

        await super()._add_protobuf_unary_handler(handle_name, gated, input_protobuf_type, balanced)

    async def call_binary_stream_handler(self, peer_id: Any, handler_name: str) -> Any:
        """As hivemind's, for hivemind's own calls: only members are called; frames are capped, and read in one go."""
        await self._let_out(peer_id.to_base58(), handler_name)
        info, reader, writer = await super().call_binary_stream_handler(peer_id, handler_name)
        self._track(peer_id.to_base58(), writer)
        return info, _bulk(reader, writer), writer

    async def _call_unary_protobuf_handler(self, peer_id: Any, handle_name: str, message: Any, kind: Any) -> Any:
        """As hivemind's: only members are called."""
        await self._let_out(peer_id.to_base58(), handle_name)
        try:
            return await super()._call_unary_protobuf_handler(peer_id, handle_name, message, kind)
        except P2PHandlerError as error:
            if self.gate is not None and str(error).startswith(NOT_ADMITTED):
                self.gate.refused_by(PeerId(peer_id.to_base58()))
            raise

    async def _let_in(self, remote: Any, name: str, writer: asyncio.StreamWriter | None = None) -> None:
        if self.gate is None:
            return
        peer = PeerId(remote.to_base58())
        await self.gate.let_in(peer, name)
        if writer is not None:
            self.gate.track(peer, writer)

    async def _let_out(self, peer: str, name: str) -> None:
        if self.gate is not None:
            try:
                await self.gate.let_out(PeerId(peer), name)
            except NotAdmitted as error:
                raise _GateShut(str(error), passing=error.passing) from None

    def _track(self, peer: str, writer: asyncio.StreamWriter) -> None:
        if self.gate is not None:
            self.gate.track(PeerId(peer), writer)

    @property
    def pid(self) -> int:
        """The process id of p2pd, for measurements."""
        return int(self._child.pid)

    async def wait_dead(self) -> str:
        """Wait until p2pd ends; returns the last lines that it said."""
        await ended(self._child)
        return " / ".join(self._last_lines)[-400:]

    async def serve_raw(self, name: str, handler: StreamCallback, refuse: RefuseCallback | None) -> None:
        """Call `handler(info, reader, writer)` for each incoming stream of `name`; no framing, no cap.

        Strangers to a private run get what `refuse(error, reader, writer)` says; with None the stream is open to them.
        """

        async def gated(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await self._let_in(info.peer_id, name, writer)
            except NotAdmitted as error:
                if refuse is not None:
                    await refuse(error, reader, writer)
            else:
                await handler(info, reader, writer)

        await super().add_binary_stream_handler(name, handler if refuse is None else gated)

    async def open_raw(self, peer: str, name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Dial `peer` and open a stream of `name`; closes what it opened when it fails or is cancelled.

        Raises:
            P2PDaemonError, OSError, asyncio.IncompleteReadError: the peer, or the daemon, did not take it; or the peer
                is no member of this private run.
        """
        await self._let_out(peer, name)
        reader, writer = await self.open_to_anybody(peer, name)
        self._track(peer, writer)
        return reader, writer

    async def open_to_anybody(self, peer: str, name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """As `open_raw`, past the gate: to ask a stranger who it is."""
        path = self._directory.path / "p2pd.sock"
        reader, writer = await asyncio.open_unix_connection(str(path))
        try:
            request = p2pd_pb2.StreamOpenRequest(peer=PeerID.from_base58(peer).to_bytes(), proto=[name])
            await write_pbmsg(writer, p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=request))
            response = p2pd_pb2.Response()
            await read_pbmsg_safe(reader, response)
            raise_if_failed(response)
        except BaseException:
            writer.close()
            raise
        return reader, writer

    async def connect(self, peer: str, addresses: tuple[str, ...]) -> None:
        """Dial `peer` at `addresses` (without its id at the end), or wherever the DHT knows it when there are none.

        Raises:
            P2PDaemonError, OSError, asyncio.IncompleteReadError: nobody answered there, or not under that id.
        """
        await self._client.connect(PeerID.from_base58(peer), [Multiaddr(address) for address in addresses])

    async def shutdown(self) -> None:
        """End p2pd, by force after three seconds, and remove its sockets."""
        self._terminate()
        await _end_client(self._client)
        if self._child is not None:
            try:
                async with asyncio.timeout(_STOP_SECONDS):
                    await ended(self._child)
            except TimeoutError:
                self._child.kill()
                await ended(self._child)
        self._directory.remove()


def _bulk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> BulkReader:
    """hivemind reads an 8-byte length and then asks for so many bytes, whatever it says: no more than a frame has."""
    return BulkReader(reader, writer, most_bytes=MAX_HIVEMIND_FRAME_BYTES)


async def _end_client(client: Any) -> None:
    """hivemind leaves the two tasks of its client to the garbage collector, which then tells of p2pd's end."""
    if client is None:  # the launch failed
        return
    tasks = [task for task in (client.control._read_task, client.control._write_task) if task is not None]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


DIALLING = re.compile(r"^(?:failed to dial(?: \w+)?: )+all dials failed(?: \* \[(\S+)\])? ")
"""What libp2p says before why; its group is the first address that it tried."""


def one_line(error: BaseException) -> str:
    """What a daemon said, for a message: without its own prefix and line breaks."""
    return " ".join(str(error).removeprefix("Connect failed. msg=").split())[:300]


async def _say_no(error: NotAdmitted, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The end of one of hivemind's streams for a peer that is not let in: it raises what is said here."""
    try:
        async with asyncio.timeout(REFUSAL_SECONDS):
            await P2P.send_protobuf(p2pd_pb2.RPCError(message=repr(error)), writer)
            await read_out(reader)
    except (TimeoutError, OSError) as gone:
        logger.debug("a refusal was not taken reason=%r", gone)
    finally:
        writer.close()


async def read_out(reader: asyncio.StreamReader) -> None:
    """Read on, keeping nothing: p2pd resets a stream that is closed with data unread, and our last words with it."""
    while await reader.read(_READ_OUT_BYTES):
        pass


def _flags(options: DaemonOptions, control: Multiaddr) -> list[str]:
    flags = [f"-listen={control}", f"-idleTimeout={_IDLE_SECONDS}s", "-connManager=1", "-autonat=0"]
    # TLS alone: with both, Noise is taken, whose ChaCha20 costs more than AES does with the processor's help.
    flags += [
        "-tls=1",
        "-noise=0",
        "-natPortMap=0",
        f"-relay={int(options.use_relay)}",
        f"-autoRelay={int(bool(options.relays))}",
    ]
    flags += ["-relayService=0"] if not options.use_relay else []
    flags += ["-dhtClient=1" if options.dht_client else "-dhtServer=1"]
    flags += [f"-hostAddrs={','.join(options.listen)}"] if options.listen else ["-noListenAddrs=1"]
    flags += [f"-announceAddrs={','.join(options.announce)}"] if options.announce else []
    flags += [f"-trustedRelays={','.join(options.relays)}"] if options.relays else []
    flags += [f"-id={options.identity_path}"] if options.identity_path else []
    return flags
