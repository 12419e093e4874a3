from __future__ import annotations

import asyncio
import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2

from peers.errors import DIAL_BACKOFF, NetworkFailed, reason_of
from peers.hivemind_daemon import MAX_HIVEMIND_FRAME_BYTES
from peers.hivemind_network import HivemindNetwork
from peers.network import ByteStream, PeerId
from peers.streams.answering import CallServer
from peers.streams.calls import Answer, Question, hello_maker
from peers.streams.fields import to_body
from peers.streams.traffic import Traffic
from peers.streams.wire import Frame, read_frame, write_frame
from tests.fakes import RUN
from tests.integration.peers.conftest import Start
from tests.integration.peers.echo_peer import echo

ROOT = Path(__file__).parents[3]


async def ask(stream: ByteStream, data: bytes) -> bytes:
    stream.writer.write(len(data).to_bytes(4, "big") + data)
    async with asyncio.timeout(20):
        await stream.writer.drain()
        size = int.from_bytes(await stream.reader.readexactly(4), "big")
        return await stream.reader.readexactly(size)


async def test_small_and_large_messages_come_back_and_the_caller_is_known(start: Start) -> None:
    ann = await start("ann")
    bob = await start("bob", ann)
    callers: list[PeerId] = []

    async def noted_echo(stream: ByteStream) -> None:
        callers.append(stream.peer)
        await echo(stream)

    await ann.serve_stream("echo", noted_echo)
    stream = await bob.open_stream(ann.peer_id, "echo")
    for size in (0, 1, 2304, 2 << 20):
        data = os.urandom(size)
        assert await ask(stream, data) == data
    assert callers == [bob.peer_id]
    stream.writer.close()


async def test_a_third_peer_is_reached_by_its_id_alone(start: Start) -> None:
    ann = await start("ann")
    bob, eve = await start("bob", ann), await start("eve", ann)
    await bob.serve_stream("echo", echo)
    await eve.connect(bob.peer_id, await bob.addresses())
    assert await ask(await eve.open_stream(bob.peer_id, "echo"), b"hello") == b"hello"
    client = await start("client", ann, client_mode=True)
    assert await client.addresses() == ()
    assert await ask(await client.open_stream(bob.peer_id, "echo"), b"hello") == b"hello"


async def test_a_peer_that_has_ended_is_named_once_with_the_address_and_what_it_said(start: Start) -> None:
    ann = await start("ann")
    bob = await start("bob", ann)
    (address,) = await bob.addresses()
    await bob.stop()
    where = re.escape(address.partition("/p2p/")[0])
    with pytest.raises(NetworkFailed, match=f"^no 'echo' stream to peer {bob.peer_id}: {where}: .*refused$") as caught:
        await ann.open_stream(bob.peer_id, "echo")
    with pytest.raises(NetworkFailed, match=f"{where}: {DIAL_BACKOFF}$"):
        await ann.open_stream(bob.peer_id, "echo")
    assert reason_of(bob.peer_id, caught.value) == str(caught.value)
    assert reason_of(ann.peer_id, "it is slow") == f"peer {ann.peer_id}: it is slow"


async def test_a_kind_or_a_run_that_is_not_served_and_a_stranger_are_network_errors(start: Start) -> None:
    ann = await start("ann")
    bob = await start("bob", ann)
    with pytest.raises(NetworkFailed, match="no 'echo' stream to peer"):
        await bob.open_stream(ann.peer_id, "echo")
    with pytest.raises(NetworkFailed, match="no 'echo' stream to peer"):
        await bob.open_stream(PeerId("QmNobody"), "echo")
    with pytest.raises(NetworkFailed, match="cannot be reached"):
        await bob.connect(PeerId("Qm" + "a" * 44), ("/ip4/127.0.0.1/tcp/9",))
    with pytest.raises(NetworkFailed, match="cannot be reached"):
        await bob.connect(ann.peer_id, ("/nonsense/x",))


async def test_stopping_cancels_handlers_and_ends_streams(start: Start) -> None:
    ann = await start("ann")
    bob = await start("bob", ann)
    entered, left = asyncio.Event(), asyncio.Event()

    async def wait_forever(stream: ByteStream) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()

    await ann.serve_stream("wait", wait_forever)
    stream = await bob.open_stream(ann.peer_id, "wait")
    async with asyncio.timeout(20):
        await entered.wait()
        await ann.stop()
        assert left.is_set()
        assert await stream.reader.read() == b""


async def test_streams_beyond_the_limit_are_closed_and_places_come_back(start: Start) -> None:
    ann = await start("ann", max_streams_per_peer=2)
    bob = await start("bob", ann)
    await ann.serve_stream("echo", echo)
    streams = [await bob.open_stream(ann.peer_id, "echo") for _ in range(2)]
    for stream in streams:
        assert await ask(stream, b"in") == b"in"
    third = await bob.open_stream(ann.peer_id, "echo")
    async with asyncio.timeout(20):
        assert await third.reader.read() == b""
        streams[0].writer.close()
        while True:  # the place is free when ann has seen the end of the first stream
            again = await bob.open_stream(ann.peer_id, "echo")
            try:
                assert await ask(again, b"in") == b"in"
                break
            except (asyncio.IncompleteReadError, ConnectionError):
                again.writer.close()


async def test_a_handler_that_fails_ends_its_stream_only(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    ann = await start("ann")
    bob = await start("bob", ann)

    async def fail(stream: ByteStream) -> None:
        raise RuntimeError("a bug")

    await ann.serve_stream("fail", fail)
    await ann.serve_stream("echo", echo)
    async with asyncio.timeout(20):
        stream = await bob.open_stream(ann.peer_id, "fail")
        assert await stream.reader.read() == b""
    assert "a bug" in caplog.text
    assert await ask(await bob.open_stream(ann.peer_id, "echo"), b"on") == b"on"


def wait_gone(pid: int, seconds: float) -> bool:
    """Whether process `pid`, not a child of this one, ends in time."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)


@pytest.fixture
def child_peer(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A peer in another process, killed with no warning at the end at the latest."""
    command = [sys.executable, "-m", "tests.integration.peers.echo_peer", RUN, str(tmp_path / "child.id")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        yield child
        child.kill()


async def test_a_killed_peer_takes_its_daemon_along_and_its_streams_end_at_once(
    start: Start, child_peer: subprocess.Popen[str]
) -> None:
    assert child_peer.stdout is not None
    where = json.loads(await asyncio.to_thread(child_peer.stdout.readline))
    bob = await start("bob", bootstrap=tuple(where["addresses"]))
    stream = await bob.open_stream(where["peer"], "echo")
    assert await ask(stream, b"alive") == b"alive"
    child_peer.kill()
    async with asyncio.timeout(30):
        assert await stream.reader.read() == b""
    assert wait_gone(where["p2pd"], 30)
    with pytest.raises(NetworkFailed):
        await bob.open_stream(where["peer"], "echo")


async def test_a_node_whose_daemon_is_gone_says_so_and_still_stops(start: Start) -> None:
    ann = await start("ann")
    os.kill(ann.p2p.pid, signal.SIGKILL)
    async with asyncio.timeout(30):
        await ann.wait_dead()
        with pytest.raises(NetworkFailed):
            await ann.open_stream(ann.peer_id, "echo")
        await ann.stop()


async def serve_pings(network: HivemindNetwork) -> None:
    async def answer(requests, context):  # type: ignore[no-untyped-def]
        async for request in requests:
            yield dht_pb2.PingResponse(peer=request.peer)

    await network.p2p.add_protobuf_handler("pings", answer, dht_pb2.PingRequest, stream_input=True, stream_output=True)


async def call_pings(caller: HivemindNetwork, callee: PeerId, size: int) -> int:
    async def requests():  # type: ignore[no-untyped-def]
        yield dht_pb2.PingRequest(peer=dht_pb2.NodeInfo(node_id=b"x" * size))

    answers = await caller.p2p.iterate_protobuf_handler(
        PeerID.from_base58(callee), "pings", requests(), dht_pb2.PingResponse
    )
    return len([len(answer.peer.node_id) async for answer in answers if len(answer.peer.node_id) == size])


async def test_a_hivemind_frame_that_claims_too_much_is_refused_and_the_peer_lives_on(start: Start) -> None:
    ann = await start("ann")
    bob = await start("bob", ann)
    await serve_pings(ann)
    for length in (MAX_HIVEMIND_FRAME_BYTES + 1, 2**63):
        reader, writer = await bob.p2p.open_raw(ann.peer_id, "pings")
        writer.write(b"\x00" + length.to_bytes(8, "big"))
        async with asyncio.timeout(20):
            assert await reader.read() == b""
        writer.close()
    assert await call_pings(bob, ann.peer_id, 1 << 20) == 1


class Nothing:
    async def answer(self, question: Question) -> Answer:
        return Answer()

    async def stream_closed(self, peer: PeerId, stream: int) -> None:
        pass


@pytest.mark.parametrize("greeted", [True, False])
async def test_who_sends_nonsense_hears_why_also_with_much_of_it_on_the_way(start: Start, greeted: bool) -> None:
    ann = await start("ann")
    bob = await start("bob", ann)
    hello = hello_maker(RUN, "swarmtune 1")
    await ann.serve_stream("info", CallServer(hello, Nothing(), Traffic()).serve)
    for _ in range(5):
        stream = await bob.open_stream(ann.peer_id, "info")
        async with asyncio.timeout(30):
            if greeted:
                await write_frame(stream.writer, Frame(request=0, kind="hello", body=to_body(hello())))
                assert (await read_frame(stream.reader)).kind == "hello"
            stream.writer.write(bytes(range(255, 0, -1)) * 2**14)
            assert (await read_frame(stream.reader)).kind == "refusal"
        stream.writer.close()
