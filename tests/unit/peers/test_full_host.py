"""A host whose cache is full: who waits, who is refused and why, and that those who are in notice nothing."""

from __future__ import annotations

import asyncio

import pytest
import torch

from blocks.decoding.cache import most_bytes
from blocks.errors import BadSession, CacheFull
from peers.errors import BadMessage
from peers.network import PeerId
from peers.streams.calls import Answer
from peers.streams.messages import CloseSession, Opened, parse_message
from tests.unit.peers.test_decode_service import HIDDEN_BTD, Host, host, opening, step

__all__ = ["host"]  # a fixture

HALF = 128  # positions; two such sessions fill the host's cache of 120000 bytes up to a small one


def ask(host: Host, session: str, peer: str, *, seconds: float = 30.0, length: int = HALF) -> asyncio.Task[Answer]:
    message = opening(session, max_length=length, wait_seconds=seconds)
    return asyncio.create_task(host.ask(message, peer=peer, stream=hash(peer)))


async def settle(host: Host) -> None:
    """Until nothing more happens without something from outside."""
    for _ in range(3):
        await host.idle()
        for _ in range(20):
            await asyncio.sleep(0)


async def fill(host: Host) -> int:
    """Sessions of ann until there is room for none of `HALF` positions."""
    count = 0
    while host.caches.free_bytes >= most_bytes(host.caches, host.model.span, batch=1, max_length=HALF):
        await ask(host, f"ann{count}", f"ann{count}")
        count += 1
    return count


async def test_a_session_waits_for_room_and_opens_when_another_ends(host: Host) -> None:
    assert await fill(host) > 0
    waiting = ask(host, "bob", "bob")
    await settle(host)
    assert not waiting.done()
    with pytest.raises(CacheFull, match="another host"):
        await ask(host, "cem", "cem", seconds=0.0)
    await host.ask(CloseSession(session="ann0"), peer="ann0", stream=hash("ann0"))
    assert isinstance((await waiting).message, Opened)
    await host.ask(step(0, session="bob"), HIDDEN_BTD, peer="bob")


async def test_in_time_or_not_at_all_and_then_nothing_is_left(host: Host) -> None:
    await fill(host)
    held = host.caches.sessions
    with pytest.raises(CacheFull, match=r"in 0\.05 s"):
        await ask(host, "bob", "bob", seconds=0.05)
    await settle(host)
    assert host.caches.sessions == held
    await host.ask(CloseSession(session="ann0"), peer="ann0", stream=hash("ann0"))
    await ask(host, "bob", "bob", seconds=0.0)


@pytest.mark.parametrize("gone", ["closed", "vanished", "silent"])
async def test_who_leaves_while_it_waits_leaves_nothing(host: Host, gone: str) -> None:
    await fill(host)
    waiting = ask(host, "bob", "bob")
    await settle(host)
    if gone == "closed":
        await host.ask(CloseSession(session="bob"), peer="bob", stream=hash("bob"))
    elif gone == "vanished":
        await host.service.stream_closed(PeerId("bob"), hash("bob"))
    else:
        host.now = 11.0
        await host.service.sweep()
    await host.ask(CloseSession(session="ann0"), peer="ann0", stream=hash("ann0"))
    with pytest.raises(BadSession, match=r"while it (waited|was opened)"):
        await waiting
    await settle(host)
    assert "bob" not in host.caches.sessions


async def test_a_flood_of_sessions_does_not_disturb_those_who_are_in(host: Host) -> None:
    await ask(host, "ann", "ann", length=32)
    (whole,) = (await host.ask(step(0, session="ann"), HIDDEN_BTD)).tensors
    flood = [ask(host, f"m{i}", "mallory", length=16) for i in range(100)]
    await settle(host)
    refused = [task for task in flood if task.done() and task.exception() is not None]
    assert refused
    assert all(isinstance(task.exception(), CacheFull) for task in refused)
    (again,) = (await host.ask(step(5, session="ann"), HIDDEN_BTD[:, 5:])).tensors
    torch.testing.assert_close(again, whole[:, 5:], rtol=0, atol=1e-5)
    await ask(host, "bob", "bob", seconds=0.0, length=16)
    await host.service.stream_closed(PeerId("mallory"), hash("mallory"))
    for task in flood:
        task.cancel()
    await asyncio.gather(*flood, return_exceptions=True)
    await settle(host)
    assert host.caches.sessions == ("ann", "bob")


async def test_a_session_grows_past_what_was_expected_until_there_is_no_room(host: Host) -> None:
    await host.ask(opening("s", max_length=HALF, expected_length=4))
    before = host.caches.free_bytes
    long_BTD = torch.randn(1, HALF, 64, generator=torch.Generator().manual_seed(3))
    await host.ask(step(0), long_BTD[:, :4])
    await host.ask(step(4), long_BTD[:, 4:40])
    assert host.caches.free_bytes < before, "it has not grown"
    await fill(host)
    await ask(host, "small", "cem", length=16)
    with pytest.raises(CacheFull, match="go on at another host"):
        await host.ask(step(40), long_BTD[:, 40:])
    await host.ask(step(40), long_BTD[:, 40:60])
    await host.ask(CloseSession(session="ann0"), peer="ann0", stream=hash("ann0"))
    await host.ask(step(60), long_BTD[:, 60:])


def test_positions_before_the_beginning_and_waits_that_are_none_are_refused() -> None:
    with pytest.raises(BadMessage, match="position"):
        parse_message("step", {"session": "s", "number": 1, "position": -1})
    good = {"session": "s", "span": [2, 4], "batch": 1, "max_length": 8}
    parse_message("open", {**good, "wait_seconds": 3.0, "expected_length": 8})
    for wrong in ({"wait_seconds": float("nan")}, {"wait_seconds": "long"}, {"expected_length": 0}):
        with pytest.raises(BadMessage, match=next(iter(wrong))):
            parse_message("open", {**good, **wrong})
