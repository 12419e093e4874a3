"""Every way to call a peer of a run, tried by a peer that shows whatever a test gives it to show."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PHandlerError
from hivemind.proto import averaging_pb2, dht_pb2
from hivemind.utils import MSGPackSerializer
from hivemind.utils.asyncio import as_aiter
from hivemind.utils.timed_storage import get_dht_time

from averaging.config import AveragingConfig
from averaging.hivemind_exchange import HivemindExchange
from averaging.hivemind_servicer import AveragingServicer
from peers.errors import NOT_ADMITTED, NetworkFailed, StreamClosed
from peers.hivemind_network import HivemindNetwork
from peers.network import ByteStream, PeerId
from peers.streams.calls import hello_maker
from peers.streams.fields import to_body
from peers.streams.messages import Refusal, RefusalCode, StreamKind, parse_message
from peers.streams.wire import Frame, read_frame, write_frame
from tests.fakes import RUN

KINDS = tuple(StreamKind)
DHT = ("ping", "find", "store")
AVERAGING = ("join_group", "aggregate_part", "vote")
EVERYTHING = frozenset({*DHT, *AVERAGING, *KINDS})
PASSED = "passed"
_SECONDS = 20.0


@dataclass
class Watched:
    """What a node was told on its own streams: who got through to which handler, and which streams ended."""

    node: HivemindNetwork
    told: list[tuple[str, PeerId]] = field(default_factory=list)
    exchange: HivemindExchange | None = None
    met: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self) -> None:
        """Answer every kind of stream with the same hello, then echo frames until the other side is gone."""
        for kind in KINDS:
            await self.node.serve_stream(kind, self._handler(kind))
        self.exchange = HivemindExchange(
            self.node, self.node.identity, RUN, AveragingConfig(read_seconds=0.2, reduce_seconds=0.2, stall_seconds=1)
        )
        await self.exchange.start()

    def _handler(self, kind: str) -> Callable[[ByteStream], Awaitable[None]]:
        async def handle(stream: ByteStream) -> None:
            self.told.append((kind, stream.peer))
            self.met.set()
            with contextlib.suppress(StreamClosed):
                while True:
                    await write_frame(stream.writer, await read_frame(stream.reader))

        return handle


class Mask:
    """Answers whoever asks a node for its membership with whatever it is given, as one that holds to no rule."""

    def __init__(self, node: HivemindNetwork) -> None:
        self._node, self._shown, self._is_served = node, b"", False

    async def show(self, membership: bytes | None) -> None:
        """From now on; None, before anything else was shown, is not to know of memberships at all."""
        if membership is not None:
            self._shown = membership
            if not self._is_served:
                self._is_served = True
                await self._node.p2p.serve_raw(f"swarmtune/{RUN}/member", self._tell, None)

    async def _tell(self, info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(len(self._shown).to_bytes(2, "big") + self._shown + b"\0\0")
        await writer.drain()
        writer.close()


def forget_strangers(node: HivemindNetwork) -> None:
    """So that it asks again at once, as it else does after some seconds."""
    assert node.gate is not None
    node.gate._strangers.clear()


async def try_everything(caller: HivemindNetwork, callee: HivemindNetwork) -> dict[str, str]:
    """What comes of each call: PASSED, or why not."""
    peer = PeerID.from_base58(callee.peer_id)
    calls: dict[str, Awaitable[object]] = {kind: _open(caller, callee.peer_id, kind) for kind in KINDS}
    calls |= _dht_calls(caller, peer) | _averaging_calls(caller, peer)
    outcomes = await asyncio.gather(*(_outcome(call) for call in calls.values()))
    return dict(zip(calls, outcomes, strict=True))


async def _outcome(call: Awaitable[object]) -> str:
    try:
        async with asyncio.timeout(_SECONDS):
            await call
    except P2PHandlerError as error:
        message = str(error)
        return (
            message[message.index(NOT_ADMITTED) :] if NOT_ADMITTED in message else PASSED
        )  # to a handler that refuses
    except (NetworkFailed, StreamClosed) as error:
        return str(error)
    return PASSED


async def _open(caller: HivemindNetwork, peer: PeerId, kind: str) -> None:
    stream = await caller.open_stream(peer, kind)
    try:
        hello = hello_maker(RUN, "test")()
        await write_frame(stream.writer, Frame(request=0, kind=hello.kind, body=to_body(hello)))
        reply = await read_frame(stream.reader)
        answer = parse_message(reply.kind, reply.body)
        if isinstance(answer, Refusal) and answer.code == RefusalCode.MEMBER:
            raise NetworkFailed(NOT_ADMITTED + answer.reason)
    finally:
        stream.writer.close()


def _dht_calls(caller: HivemindNetwork, peer: PeerID) -> dict[str, Awaitable[object]]:
    stub = DHTProtocol.get_stub(caller.dht_node.protocol, peer)
    sender = dht_pb2.NodeInfo(node_id=caller.dht_node.node_id.to_bytes())
    key = DHTID.generate("what nobody else uses").to_bytes()
    stored = dht_pb2.StoreRequest(
        keys=[key],
        subkeys=[DHTProtocol.IS_REGULAR_VALUE],
        values=[MSGPackSerializer.dumps(caller.peer_id)],
        expiration_time=[get_dht_time() + 60],
        in_cache=[False],
        peer=sender,
    )
    return {
        "ping": stub.rpc_ping(dht_pb2.PingRequest(peer=sender)),
        "find": stub.rpc_find(dht_pb2.FindRequest(keys=[key], peer=sender)),
        "store": stub.rpc_store(stored),
    }


def _averaging_calls(caller: HivemindNetwork, peer: PeerID) -> dict[str, Awaitable[object]]:
    stub = AveragingServicer.get_stub(caller.p2p, peer, namespace=RUN)

    async def first(stream: Awaitable[AsyncIterator[object]]) -> None:
        async for _ in await stream:
            break

    return {
        "join_group": first(stub.rpc_join_group(averaging_pb2.JoinRequest(gather=b"x"))),
        "aggregate_part": first(stub.rpc_aggregate_part(as_aiter(averaging_pb2.AveragingData(group_id=b"x")))),
        "vote": first(stub.rpc_vote(as_aiter(averaging_pb2.DownloadData(metadata=b"x")))),
    }


def got_value(node: HivemindNetwork) -> bool:
    """Whether the value that `try_everything` stores has come to `node`."""
    return node.dht_node.protocol.storage.get(DHTID.generate("what nobody else uses")) is not None
