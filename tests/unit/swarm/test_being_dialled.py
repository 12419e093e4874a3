"""Peers of a run are asked to dial this machine; what they say is kept apart from what they could not do."""

from __future__ import annotations

import asyncio
import socket

import pytest

from peers.dialling_back import DialBack
from peers.errors import Refused
from peers.info_service import InfoService
from peers.network import PeerId
from peers.streams.answering import CallServer
from peers.streams.calls import hello_maker
from peers.streams.messages import AskDial, Dialled
from peers.streams.pool import Pool
from peers.streams.traffic import Traffic
from swarm.being_dialled import Door, ask_to_dial, port_of
from tests.fakes_network import fake_swarm

HELLO = hello_maker("run-1", "swarmtune 1")


async def seen_here(peer: PeerId) -> tuple[str, ...]:
    return ("/ip4/127.0.0.1/tcp/54321",)


class Rude(DialBack):
    async def answer(self, peer: PeerId, ask: AskDial) -> Dialled:
        raise Refused("not \x1b[2Jnow")


async def test_each_peer_that_is_asked_says_for_itself() -> None:
    kinds = {"new": DialBack(seen_here), "old": None, "rude": Rude(seen_here), "never": DialBack(seen_here)}
    async with asyncio.timeout(20), fake_swarm() as swarm:
        for name, dial_back in kinds.items():
            service = InfoService(lambda: b"", Traffic(), dial_back=dial_back)
            await swarm.join(name).serve_stream("info", CallServer(HELLO, service, Traffic()).serve)
        pool = Pool(swarm.join("ann"), HELLO, Traffic(), {})
        door = Door(host="127.0.0.1", port=0)
        new, old, rude = await ask_to_dial(pool, [PeerId(name) for name in kinds], door)
        (gone,) = await ask_to_dial(pool, [PeerId("gone")], door)
        with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
            await ask_to_dial(pool, [PeerId("old")], Door(host="127.0.0.1", port=taken.getsockname()[1]))
        await pool.close()
    assert (new.address, new.reached, new.is_here, new.is_far) == ("127.0.0.1", True, True, False)
    assert (old.address, old.why) == (None, "its version cannot do this")
    assert rude.why == "not [2Jnow", "it goes to a terminal"
    assert "cannot be reached" in gone.why


async def test_the_announced_port_is_dialled_where_one_is_given() -> None:
    async with asyncio.timeout(20), fake_swarm() as swarm:
        service = InfoService(lambda: b"", Traffic(), dial_back=DialBack(seen_here, dial_seconds=0.05))
        await swarm.join("bob").serve_stream("info", CallServer(HELLO, service, Traffic()).serve)
        pool = Pool(swarm.join("ann"), HELLO, Traffic(), {})
        (attempt,) = await ask_to_dial(pool, [PeerId("bob")], Door(host="127.0.0.1", port=0, announced_port=9))
        await pool.close()
    assert (attempt.port, attempt.address, attempt.reached) == (9, "127.0.0.1", False)


def test_the_port_of_an_announcement() -> None:
    assert port_of(["/dns4/a.example/udp/5/quic", "/ip4/1.2.3.4/tcp/31330/p2p/12D3"]) == 31330
    assert port_of(["/ip4/1.2.3.4/tcp/31330"]) == 31330
    assert port_of([]) == 0
