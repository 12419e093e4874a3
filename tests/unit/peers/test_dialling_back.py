"""A peer is dialled where it is seen and nowhere else, seldom, and learns nothing but whether its token was read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from peers.dialling_back import AGAIN_SECONDS, DialBack, ip_of
from peers.errors import BadMessage, NetworkFailed, Refused
from peers.network import PeerId
from peers.streams.messages import AskDial, Dialled, parse_message

ANN = PeerId("ann")
TOKEN = bytes(range(16))
HERE = "/ip4/127.0.0.1/tcp/54321"


class Sight:
    """Where peers are seen, and the time."""

    def __init__(self, *addresses: str) -> None:
        self.addresses, self.now = addresses, 0.0
        self.asked: asyncio.Queue[PeerId] = asyncio.Queue()

    async def seen_at(self, peer: PeerId) -> tuple[str, ...]:
        self.asked.put_nowait(peer)
        return self.addresses

    def dial_back(self, dial_seconds: float = 30.0) -> DialBack:
        return DialBack(self.seen_at, clock=lambda: self.now, dial_seconds=dial_seconds)


@asynccontextmanager
async def listener(said: bytes) -> AsyncIterator[tuple[int, asyncio.Queue[bytes]]]:
    """A port where `said` is said, and what was heard there."""
    heard: asyncio.Queue[bytes] = asyncio.Queue()

    async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        heard.put_nowait(await reader.read())
        writer.close()

    async with await asyncio.start_server(tell, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1], heard


async def test_who_says_its_token_where_it_is_seen_was_reached_and_nothing_is_written_there() -> None:
    sight = Sight("/ip4/9.9.9.9/tcp/4001/p2p/relay/p2p-circuit", HERE)
    async with listener(TOKEN) as (port, heard):
        answer = await sight.dial_back().answer(ANN, AskDial(port=port, token=TOKEN))
        async with asyncio.timeout(20):
            assert await heard.get() == b""
    assert answer == Dialled(address="127.0.0.1", reached=True)
    assert sight.asked.get_nowait() == ANN


@pytest.mark.parametrize("said", [TOKEN[:15] + b"x", TOKEN[:15], b""])
async def test_whatever_else_answers_is_told_as_nothing_would_be(said: bytes) -> None:
    async with listener(said) as (open_port, _):
        pass_by = Sight(HERE).dial_back(dial_seconds=0.1)
        started = asyncio.get_running_loop().time()
        answer = await pass_by.answer(ANN, AskDial(port=open_port, token=TOKEN))
        assert answer == Dialled(address="127.0.0.1", reached=False)
        assert asyncio.get_running_loop().time() - started >= 0.09, "a closed port would be told from an open one"


async def test_a_closed_port_takes_as_long_as_a_silent_one() -> None:
    async with listener(TOKEN) as (port, _):
        pass
    started = asyncio.get_running_loop().time()
    answer = await Sight(HERE).dial_back(dial_seconds=0.1).answer(ANN, AskDial(port=port, token=TOKEN))
    assert not answer.reached
    assert asyncio.get_running_loop().time() - started >= 0.09


async def test_an_address_is_dialled_once_in_ten_seconds_whoever_asks() -> None:
    sight = Sight(HERE)
    dial_back = sight.dial_back()
    async with listener(TOKEN) as (port, _):
        ask = AskDial(port=port, token=TOKEN)
        await dial_back.answer(ANN, ask)
        with pytest.raises(Refused, match=r"127\.0\.0\.1 was dialled just now; ask again in 10 s"):
            await dial_back.answer(PeerId("bob"), ask)
        sight.now = AGAIN_SECONDS
        assert (await dial_back.answer(ANN, ask)).reached


async def test_few_are_dialled_at_a_time_and_who_gives_up_leaves_room() -> None:
    sight = Sight()
    dial_back = sight.dial_back()
    async with listener(b"") as (port, _), asyncio.TaskGroup() as tasks:
        ask, running = AskDial(port=port, token=TOKEN), []
        for number in range(4):
            sight.addresses = (f"/ip4/127.0.0.{number + 2}/tcp/5",)
            running.append(tasks.create_task(dial_back.answer(ANN, ask)))
            await sight.asked.get()
        sight.addresses = (HERE,)
        with pytest.raises(Refused, match="dials others now"):
            await dial_back.answer(ANN, ask)
        for task in running:
            task.cancel()
    async with listener(TOKEN) as (port, _):
        assert (await dial_back.answer(ANN, AskDial(port=port, token=TOKEN))).reached


@pytest.mark.parametrize("addresses", [(), ("/ip4/9.9.9.9/tcp/1/p2p/x/p2p-circuit",), ("/dns4/a.example/tcp/1",)])
async def test_who_is_seen_nowhere_is_dialled_nowhere(addresses: tuple[str, ...]) -> None:
    with pytest.raises(Refused, match="no direct connection"):
        await Sight(*addresses).dial_back().answer(ANN, AskDial(port=1, token=TOKEN))


async def test_a_dead_daemon_is_a_refusal() -> None:
    async def gone(peer: PeerId) -> tuple[str, ...]:
        raise NetworkFailed("p2pd does not answer")

    seen_at: Callable[[PeerId], Awaitable[tuple[str, ...]]] = gone
    with pytest.raises(Refused, match="p2pd"):
        await DialBack(seen_at).answer(ANN, AskDial(port=1, token=TOKEN))


def test_an_ip_address_is_read_from_a_multiaddr_or_not() -> None:
    assert str(ip_of("/ip6/2001:db8::1/tcp/5")) == "2001:db8::1"
    for other in ("", "/ip4", "/ip4/1.2.3/tcp/5", "/dns4/localhost/tcp/5", "1.2.3.4"):
        assert ip_of(other) is None


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("dial", {"port": 0, "token": TOKEN}),
        ("dial", {"port": 65536, "token": TOKEN}),
        ("dial", {"port": 1, "token": TOKEN[:15]}),
        ("dialled", {"address": "localhost", "reached": True}),
        ("dialled", {"address": "fe80::1%\x1b[2J", "reached": True}),
        ("dialled", {"address": "1" * 10_000, "reached": True}),
    ],
)
def test_what_cannot_be_is_refused(kind: str, body: dict[str, object]) -> None:
    with pytest.raises(BadMessage, match=f"{kind}: field"):
        parse_message(kind, body)
