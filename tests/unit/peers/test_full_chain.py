"""A text over hosts whose caches are full: it goes on at others, waits for room, or says why not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import torch

from blocks.errors import CacheFull
from blocks.source import ModelSource
from blocks.spans import Span
from peers.chains.decode_chain import DecodeSession
from peers.chains.decode_legs import SessionConfig
from peers.chains.history import StepInput
from peers.errors import Refused
from peers.streams.messages import RefusalCode
from peers.streams.pool import Pool
from peers.streams.traffic import Traffic
from peers.streams.wire_format import WireFormat
from tests.unit.peers.chain_swarm import HELLO, ChainSwarm, KnownRouter, chain_swarm

FRONT, BACK, WHOLE = Span(0, 3), Span(3, 6), Span(0, 6)
FULL, SPARE = {"front": FRONT, "back": BACK}, {"front2": FRONT, "back2": BACK}
CACHE_BYTES = 128 * 3 * 256  # for 128 positions of three blocks
TEXT_BTD = torch.randn(1, 48, 64, generator=torch.Generator().manual_seed(5))
STEPS = ((0, 6), (6, 7), (7, 20), (18, 30))  # the last one rolls back, as after a wrong guess
LAST = (30, 48)


@pytest.fixture
async def swarm(source: ModelSource) -> AsyncIterator[ChainSwarm]:
    async with chain_swarm(source, FULL | SPARE, cache_bytes=CACHE_BYTES) as swarm:
        yield swarm


def text(
    pool: Pool, hosts: dict[str, Span], *, longest: int = 64, expected: int | None = None, wait_seconds: float = 30.0
) -> DecodeSession:
    config = SessionConfig(
        batch=1,
        max_length=longest,
        wire=WireFormat.FP32,
        call_seconds=60.0,
        max_tries=4,
        expected_length=expected,
        wait_seconds=wait_seconds,
    )
    return DecodeSession(pool, KnownRouter(hosts), WHOLE, config)


async def take(session: DecodeSession, begin: int, end: int) -> torch.Tensor:
    return await session.step(StepInput(hidden_BTD=TEXT_BTD[:, begin:end], position=begin))


async def crowded(swarm: ChainSwarm) -> tuple[Pool, list[DecodeSession]]:
    """A neighbour's two texts, which leave room for 32 positions at the hosts that it uses."""
    neighbour = Pool(swarm.network.join("neighbour"), HELLO, Traffic(), {})
    texts = [text(neighbour, FULL), text(neighbour, FULL, longest=32)]
    for each in texts:
        await take(each, 0, 6)
    assert swarm.hosts["front"].caches.free_bytes == CACHE_BYTES // 4
    return neighbour, texts


async def whole_text(swarm: ChainSwarm) -> list[torch.Tensor]:
    session = text(swarm.client, SPARE)
    outputs = [await take(session, *step) for step in (*STEPS, LAST)]
    await session.close()
    return outputs


async def begun(session: DecodeSession, wanted: list[torch.Tensor]) -> None:
    """As far as there is room."""
    for step, output in zip(STEPS, wanted, strict=False):
        torch.testing.assert_close(await take(session, *step), output, rtol=0, atol=1e-5)
    assert session.replaced == 0


async def test_a_text_that_outgrows_its_hosts_goes_on_at_others(swarm: ChainSwarm) -> None:
    wanted = await whole_text(swarm)
    neighbour, texts = await crowded(swarm)
    session = text(swarm.client, FULL | SPARE, expected=8)
    await begun(session, wanted)
    torch.testing.assert_close(await take(session, *LAST), wanted[-1], rtol=0, atol=1e-5)
    assert session.replaced == 2
    assert [len(swarm.hosts[name].caches.sessions) for name in FULL | SPARE] == [2, 2, 1, 1]
    for each in (*texts, session):
        await each.close()
    await neighbour.close()


async def test_a_text_waits_for_room_where_there_is_no_other_host(swarm: ChainSwarm) -> None:
    wanted = await whole_text(swarm)
    neighbour, texts = await crowded(swarm)
    session = text(swarm.client, FULL, expected=8)
    await begun(session, wanted)
    front, refused, loop = swarm.hosts["front"].caches, asyncio.Event(), asyncio.get_running_loop()
    really = front.open

    def watched(*args: object, **options: object) -> None:
        try:
            really(*args, **options)  # type: ignore[arg-type]
        except CacheFull:
            loop.call_soon_threadsafe(refused.set)
            raise

    front.open = watched  # type: ignore[method-assign]
    last = asyncio.create_task(take(session, *LAST))
    async with asyncio.timeout(30):
        await refused.wait()
    await texts[1].close()
    torch.testing.assert_close(await last, wanted[-1], rtol=0, atol=1e-5)
    await take(texts[0], 6, 10)
    for each in (texts[0], session):
        await each.close()
    await neighbour.close()
    assert not any(host.caches.sessions for host in swarm.hosts.values())


async def test_who_finds_no_room_in_time_is_told_so(swarm: ChainSwarm) -> None:
    neighbour, texts = await crowded(swarm)
    session = text(swarm.client, FULL, wait_seconds=0.01)
    with pytest.raises(Refused, match=r"no room came free in 0\.01 s") as refused:
        await take(session, 0, 6)
    assert refused.value.code == RefusalCode.FULL
    assert [len(swarm.hosts[name].caches.sessions) for name in FULL] == [2, 2]
    for each in texts:
        await take(each, 6, 10)
        await each.close()
    await neighbour.close()
