"""Texts with a published adapter go through hosts that serve it, and none of them mixes it with another."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from blocks.adapters import add_version, read_units, use_version
from blocks.source import ModelSource
from blocks.spans import Span
from peers.chains.decode_chain import DecodeSession
from peers.chains.decode_legs import SessionConfig
from peers.chains.history import StepInput
from peers.errors import NoRoute, Refused
from peers.network import PeerId
from peers.published.catalogue import Published
from peers.routes.own_router import OwnRouter
from peers.routes.router import LiveRouter, RouterConfig
from peers.routes.routing import Hop
from peers.streams.messages import Opened, OpenSession, RefusalCode, StreamKind
from peers.streams.pool import Pool
from peers.streams.wire_format import WireFormat
from tests.errors_page import met
from tests.fakes import RUN, FakeDirectory, fake_peer_id, peer_record
from tests.unit.peers.chain_swarm import ChainSwarm, KnownRouter, chain_swarm
from tests.unit.peers.test_router import Clock, InfoPool

PIRATE = Published(name="pirate", content=b"p" * 32, num_bytes=100)
COOK = Published(name="cook", content=b"c" * 32, num_bytes=100)
WHOLE = Span(0, 6)
ANN, BOB, ZOE = (fake_peer_id(name) for name in ("ann", "bob", "zoe"))
STEP = StepInput(hidden_BTD=torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(4)), position=0)


async def router_over(*hosts: tuple[PeerId, float, tuple[bytes, ...]]) -> LiveRouter:
    """A router that has seen hosts of these speeds, with marks of what they serve."""
    clock = Clock()
    directory = FakeDirectory(clock)
    for peer, speed, marks in hosts:
        await directory.publish(replace(peer_record(peer, WHOLE, speed=speed), adapters=marks))
    config = RouterConfig(run=RUN, whole=WHOLE, wait_seconds=0.01, retry_seconds=0.001)
    pool: Any = InfoPool()
    pool.record = b"a record that cannot be read"
    router = LiveRouter(directory, cast(Pool, pool), config, rng=random.Random(1), clock=clock)
    await router.refresh()
    clock.now += 0.1
    return router


async def test_only_hosts_that_say_that_they_serve_it_are_routed_through() -> None:
    router = await router_over((ANN, 1.0, (PIRATE.mark,)), (BOB, 1000.0, (COOK.mark,)))
    assert await router.fast(WHOLE) == (Hop(peer=BOB, span=WHOLE),)
    pirates = router.with_adapter(PIRATE)
    assert await pirates.fast(WHOLE) == (Hop(peer=ANN, span=WHOLE),)
    assert await pirates.spread(WHOLE, 10) == (Hop(peer=ANN, span=WHOLE),)
    assert await pirates.with_adapter(COOK).fast(WHOLE) == (Hop(peer=BOB, span=WHOLE),)


async def test_a_host_is_slow_only_beside_others_that_serve_the_adapter() -> None:
    router = await router_over((ANN, 1.0, (PIRATE.mark,)), (BOB, 1000.0, ()))
    slow = Hop(peer=ANN, span=WHOLE)
    assert router.is_slow(slow)
    assert not router.with_adapter(PIRATE).is_slow(slow)


async def test_where_no_host_serves_it_the_adapter_and_the_blocks_are_named() -> None:
    router = await router_over((ANN, 1.0, ()))
    with pytest.raises(NoRoute, match="nobody who holds blocks 0:6 serves adapter 'pirate' now") as refused:
        await _without_waiting(router, PIRATE)
    met("serves adapter", refused.value)
    pirates = router.with_adapter(PIRATE)
    await pirates.refused(Hop(peer=ANN, span=WHOLE), "moved")
    pirates.failed(ANN, "gone")
    assert not router.health.is_usable(ANN)


async def _without_waiting(router: LiveRouter, adapter: Published) -> None:
    pirates: Any = router.with_adapter(adapter)
    pirates._pick(WHOLE, router._config.rules)


def test_a_peer_that_holds_all_blocks_keeps_its_texts_to_itself() -> None:
    router = OwnRouter(ANN)
    assert asyncio.run(router.with_adapter(PIRATE).fast(WHOLE)) == (Hop(peer=ANN, span=WHOLE),)


def serve(swarm: ChainSwarm, name: str, adapter: Published, *, scale: float) -> None:
    """Let a host serve an adapter that is the trained one times `scale`."""
    host = swarm.hosts[name]
    model = host.caches._model
    label = f"published-{adapter.name}"
    units = {unit: {k: t * scale + scale for k, t in named.items()} for unit, named in read_units(model).items()}
    add_version(model, label, units)
    use_version(model)
    before = host.service._parts.published

    def published(content: bytes) -> str | None:
        return label if content == adapter.content else before(content)

    host.service._parts = replace(host.service._parts, published=published)


def config_of(adapter: Published | None) -> SessionConfig:
    content = None if adapter is None else adapter.content
    return SessionConfig(batch=1, max_length=16, wire=WireFormat.FP32, adapter=content)


async def first_output(swarm: ChainSwarm, router: KnownRouter, config: SessionConfig) -> torch.Tensor:
    session = DecodeSession(swarm.client, router, WHOLE, config)
    output = await session.step(STEP)
    await session.close()
    return output


async def test_each_adapter_gives_its_own_output_over_the_same_hosts(source: ModelSource) -> None:
    hosts = {"a": Span(0, 3), "b": Span(3, 6)}
    async with chain_swarm(source, hosts) as swarm:
        for name in hosts:
            serve(swarm, name, PIRATE, scale=0.1)
            serve(swarm, name, COOK, scale=0.2)
        router = KnownRouter(hosts)
        outputs = [
            await first_output(swarm, router, config)
            for config in (config_of(None), config_of(PIRATE), config_of(COOK))
        ]
        own, pirate, cook = outputs
        assert not torch.allclose(pirate, own)
        assert not torch.allclose(cook, pirate)
        mixed = await asyncio.gather(*(first_output(swarm, router, config_of(each)) for each in (PIRATE, COOK, None)))
        for alone, beside in zip((pirate, cook, own), mixed, strict=True):
            torch.testing.assert_close(beside, alone, rtol=0, atol=1e-5)


async def test_a_host_that_refuses_the_adapter_that_it_announces_is_replaced(source: ModelSource) -> None:
    async with chain_swarm(source, {"liar": WHOLE, "a": WHOLE}) as swarm:
        serve(swarm, "a", PIRATE, scale=0.1)
        router = KnownRouter({"liar": WHOLE, "a": WHOLE})
        session = DecodeSession(swarm.client, router, WHOLE, config_of(PIRATE))
        await session.step(STEP)
        assert session.hops == (Hop(peer=PeerId("a"), span=WHOLE),)
        assert router.out == set(), "it lives, and serves other texts"
        await session.close()


async def test_a_host_that_dies_is_replaced_by_one_with_the_same_content(source: ModelSource) -> None:
    hosts = {"a": WHOLE, "other": WHOLE, "b": WHOLE}
    async with chain_swarm(source, hosts) as swarm:
        serve(swarm, "a", PIRATE, scale=0.1)
        serve(swarm, "other", replace(PIRATE, content=b"x" * 32), scale=0.7)
        serve(swarm, "b", PIRATE, scale=0.1)
        expected = await first_output(swarm, KnownRouter({"b": WHOLE}), config_of(PIRATE))
        session = DecodeSession(swarm.client, KnownRouter(hosts), WHOLE, config_of(PIRATE))
        await session.step(replace(STEP, hidden_BTD=STEP.hidden_BTD[:, :2]))
        swarm.kill("a")
        output = await session.step(replace(STEP, hidden_BTD=STEP.hidden_BTD[:, 2:], position=2))
        assert session.hops == (Hop(peer=PeerId("b"), span=WHOLE),)
        torch.testing.assert_close(output, expected[:, 2:], rtol=0, atol=1e-5)
        await session.close()


async def test_a_withdrawn_adapter_ends_its_texts_and_no_others(source: ModelSource) -> None:
    async with chain_swarm(source, {"a": WHOLE}) as swarm:
        serve(swarm, "a", PIRATE, scale=0.1)
        router = KnownRouter({"a": WHOLE})
        own = DecodeSession(swarm.client, router, WHOLE, config_of(None))
        session = DecodeSession(swarm.client, router, WHOLE, config_of(PIRATE))
        await own.step(STEP)
        await session.step(STEP)
        service = swarm.hosts["a"].service
        service._parts = replace(service._parts, published=lambda _: None)
        await service.end_version("published-pirate")
        with pytest.raises(NoRoute) as ended:
            await session.step(replace(STEP, position=5))
        met("serves the adapter with which this text began", ended.value)
        await own.step(replace(STEP, position=5))
        await own.close()


async def test_an_older_host_which_would_serve_its_own_adapter_instead_is_not_believed(source: ModelSource) -> None:
    async with chain_swarm(source, {"old": WHOLE}) as swarm:
        service = swarm.hosts["old"].service
        service._version = lambda message: ("s1", Opened(round=1, digests={}))  # type: ignore[method-assign]
        session = DecodeSession(swarm.client, KnownRouter({"old": WHOLE}), WHOLE, config_of(PIRATE))
        with pytest.raises(Refused, match="its own adapter instead") as refused:
            await session.step(STEP)
        assert refused.value.code == RefusalCode.ADAPTER
        assert len(service) == 0, "the session that was opened is closed"


async def test_an_adapter_and_none_at_once_are_refused(source: ModelSource) -> None:
    async with chain_swarm(source, {"a": WHOLE}) as swarm:
        serve(swarm, "a", PIRATE, scale=0.1)
        both = OpenSession(session="s", span=WHOLE, batch=1, max_length=8, plain=True, adapter=PIRATE.content)
        with pytest.raises(Refused):
            await swarm.client.call(PeerId("a"), StreamKind.DECODE, both, seconds=5)
