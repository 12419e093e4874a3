"""Callers that come early wait, a bounded time and in bounded numbers."""

from __future__ import annotations

import asyncio

import pytest

from averaging.errors import RoundFailed
from averaging.registry import Registry
from peers.network import PeerId

BOB = PeerId("bob")


async def test_a_caller_that_comes_early_gets_what_is_registered_later():
    registry: Registry[int] = Registry(seconds=30)
    early = asyncio.create_task(registry.get(b"key", BOB))
    await asyncio.sleep(0)
    registry.put(b"key", 5)
    assert await early == 5
    assert await registry.get(b"key", BOB) == 5


async def test_what_cannot_be_built_sends_all_callers_away_with_the_reason():
    registry: Registry[int] = Registry(seconds=30)
    early = asyncio.create_task(registry.get(b"key", BOB))
    await asyncio.sleep(0)
    registry.refuse(b"key", "no tensors here")
    for call in (early, registry.get(b"key", BOB)):
        with pytest.raises(RoundFailed, match="no tensors here"):
            await call


async def test_nobody_waits_for_ever():
    registry: Registry[int] = Registry(seconds=0.01)
    with pytest.raises(RoundFailed, match="not opened here"):
        await registry.get(b"key", BOB)
    assert not registry._futures
    assert not registry._waiting


async def test_a_caller_cannot_wait_for_everything_at_once():
    registry: Registry[int] = Registry(seconds=30, max_waiting=2)
    tasks = [asyncio.create_task(registry.get(bytes([index]), BOB)) for index in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(RoundFailed, match="more than 2"):
        await registry.get(b"another", BOB)
    registry.put(bytes([0]), 1)
    registry.drop(bytes([1]))
    assert await tasks[0] == 1
    with pytest.raises(RoundFailed):
        await tasks[1]
