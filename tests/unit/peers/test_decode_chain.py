"""A text over several hosts: it goes from host to host, and goes on to the bit when any of them dies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import torch

from blocks.source import ModelSource
from blocks.spans import Span
from peers.chains import decode_chain, hosted_steps
from peers.chains.decode_chain import DecodeSession
from peers.chains.decode_legs import SessionConfig
from peers.chains.history import StepInput
from peers.errors import NoRoute, Refused
from peers.network import PeerId
from peers.routes.routing import HostView
from peers.streams.wire_format import WireFormat
from tests.unit.peers.chain_swarm import ChainSwarm, KnownRouter, chain_swarm

WHOLE = Span(0, 6)
HOSTS = {
    "a": Span(0, 2), "b": Span(2, 4), "c": Span(4, 6),
    "a2": Span(0, 2), "b2": Span(2, 4), "c2": Span(4, 6),
    "all": WHOLE,
}  # fmt: skip
CHAIN = {name: HOSTS[name] for name in ("a", "b", "c")}
SPARE = {name: HOSTS[name] for name in ("a2", "b2", "c2")}
BATCH = 2
GENERATOR = torch.Generator().manual_seed(3)
TEXT_BTD = torch.randn(BATCH, 12, 64, generator=GENERATOR)
# What a client does in a text: a prompt, a token, two guessed ones of which one is rolled back, rows in a new order.
STEPS = (
    StepInput(hidden_BTD=TEXT_BTD[:, :5], position=0),
    StepInput(hidden_BTD=TEXT_BTD[:, 5:6], position=5),
    StepInput(hidden_BTD=TEXT_BTD[:, 6:8], position=6),
    StepInput(hidden_BTD=TEXT_BTD[:, 8:9], position=7),
    StepInput(hidden_BTD=TEXT_BTD[:, 9:10], position=8, rows=(1, 1)),
    StepInput(hidden_BTD=TEXT_BTD[:, 10:11], position=9, rows=(1, 0)),
)


@pytest.fixture
async def swarm(source: ModelSource) -> AsyncIterator[ChainSwarm]:
    async with chain_swarm(source, HOSTS) as swarm:
        yield swarm


def text(swarm: ChainSwarm, router: KnownRouter) -> DecodeSession:
    config = SessionConfig(batch=BATCH, max_length=16, wire=WireFormat.FP32, call_seconds=60.0)
    return DecodeSession(swarm.client, router, WHOLE, config)


async def expected(swarm: ChainSwarm) -> list[torch.Tensor]:
    session = text(swarm, KnownRouter({"all": WHOLE}))
    outputs = [await session.step(step) for step in STEPS]
    await session.close()
    return outputs


async def test_activations_go_from_host_to_host_and_come_from_the_last(swarm: ChainSwarm) -> None:
    session = text(swarm, KnownRouter(CHAIN))
    outputs = [await session.step(step) for step in STEPS]
    for output, wanted in zip(outputs, await expected(swarm), strict=True):
        torch.testing.assert_close(output, wanted, rtol=0, atol=1e-5)
    assert [swarm.sent_by_client(peer, "step") > 0 for peer in "abc"] == [True, False, False]
    assert [swarm.sent_by_client(peer, "collect") > 0 for peer in "abc"] == [False, False, True]
    await session.close()
    assert not any(host.caches.sessions for host in swarm.hosts.values())


@pytest.mark.parametrize(
    ("victims", "at"), [("a", 4), ("b", 1), ("b", 5), ("c", 3), ("ab", 3), ("bc", 4), ("ac", 5), ("abc", 2)]
)
async def test_a_text_goes_on_when_hosts_die(swarm: ChainSwarm, victims: str, at: int) -> None:
    wanted = await expected(swarm)
    session = text(swarm, KnownRouter(CHAIN | SPARE))
    for number, step in enumerate(STEPS):
        if number == at:
            for victim in victims:
                swarm.kill(victim)
        torch.testing.assert_close(await session.step(step), wanted[number], rtol=0, atol=1e-5)
    assert session.replaced == len(victims)
    await session.close()


async def test_hosts_that_die_one_after_the_other_are_each_replaced_by_their_neighbour(swarm: ChainSwarm) -> None:
    wanted = await expected(swarm)
    session = text(swarm, KnownRouter(CHAIN | SPARE))
    before = 0
    for number, step in enumerate(STEPS):
        if number in (2, 4):
            swarm.kill("c" if number == 2 else "b")
            before = swarm.sent_by_client("a", "step")
        torch.testing.assert_close(await session.step(step), wanted[number], rtol=0, atol=1e-5)
        if number in (2, 4):  # the client's step, and nothing of what came before it
            assert swarm.sent_by_client("a", "step") - before < 3 * step.hidden_BTD.nbytes
            assert swarm.sent_by_client("b" if number == 2 else "a", "resume") > 0
    await session.close()


async def test_what_no_host_has_kept_comes_from_the_client(swarm: ChainSwarm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosted_steps, "HISTORY_BYTES", 0)
    wanted = await expected(swarm)
    session = text(swarm, KnownRouter(CHAIN | SPARE))
    for number, step in enumerate(STEPS):
        if number == 3:
            swarm.kill("c")
        torch.testing.assert_close(await session.step(step), wanted[number], rtol=0, atol=1e-5)
    assert session.replaced == 1
    await session.close()


async def test_a_host_is_replaced_by_several_and_several_by_one(swarm: ChainSwarm) -> None:
    wanted = await expected(swarm)
    session = text(swarm, KnownRouter({"all": WHOLE} | CHAIN))
    for number, step in enumerate(STEPS):
        if number == 2:
            swarm.kill("all")
        torch.testing.assert_close(await session.step(step), wanted[number], rtol=0, atol=1e-5)
    await session.close()


async def test_a_text_without_a_replacement_ends_and_names_the_blocks(swarm: ChainSwarm) -> None:
    session = text(swarm, KnownRouter(CHAIN))
    await session.step(STEPS[0])
    swarm.kill("b")
    with pytest.raises(NoRoute, match="2:4"):
        await session.step(STEPS[1])
    await session.close()


async def test_a_step_that_no_host_would_take_is_refused_to_the_client(swarm: ChainSwarm) -> None:
    session = text(swarm, KnownRouter(CHAIN))
    await session.step(STEPS[0])
    with pytest.raises((Refused, NoRoute)):
        await session.step(StepInput(hidden_BTD=torch.zeros(BATCH, 1, 63), position=5))
    await session.close()


async def test_texts_of_one_client_share_streams_and_do_not_mix(swarm: ChainSwarm) -> None:
    wanted = await expected(swarm)

    async def one() -> list[torch.Tensor]:
        session = text(swarm, KnownRouter(CHAIN))
        outputs = [await session.step(step) for step in STEPS]
        await session.close()
        return outputs

    for outputs in await asyncio.gather(*(one() for _ in range(4))):
        for output, right in zip(outputs, wanted, strict=True):
            torch.testing.assert_close(output, right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("slow", ["b", "ab", "bc", "abc"])
async def test_a_text_leaves_hosts_that_have_become_slow(
    swarm: ChainSwarm, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    monkeypatch.setattr(decode_chain, "MOVE_STEPS", 2)
    wanted = await expected(swarm)
    router = KnownRouter(CHAIN | SPARE)
    session = text(swarm, router)
    for number, step in enumerate(STEPS):
        router.slow = {PeerId(name) for name in slow} if number >= 1 else set()
        torch.testing.assert_close(await session.step(step), wanted[number], rtol=0, atol=1e-5)
    assert (session.moved, session.replaced) == (len(slow), 0)
    assert not swarm.hosts["b"].caches.sessions
    assert swarm.hosts["b2"].caches.sessions
    last = PeerId("c2" if "c" in slow else "c")
    assert router.paces.seen(HostView(peer=last, span=Span(4, 6), tokens_per_second=1.0)).step_seconds
    await session.close()
