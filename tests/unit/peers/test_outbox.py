"""What comes out of a chain waits for its owner, once, and not without bounds."""

from __future__ import annotations

import asyncio

import pytest
import torch

from peers.chains import outbox
from peers.chains.outbox import Outbox
from peers.errors import Refused

ONE = torch.ones(1)


async def test_a_result_is_taken_once_whoever_comes_first() -> None:
    box = Outbox()
    early = asyncio.create_task(box.take("p", "1", seconds=30))
    await asyncio.sleep(0)
    box.put("p", "1", ONE)
    assert await early is ONE
    box.put("p", "2", ONE)
    assert await box.take("p", "2", seconds=30) is ONE
    with pytest.raises(Refused, match="within"):
        await box.take("p", "2", seconds=0.01)


async def test_a_second_collector_takes_the_place_of_the_first() -> None:
    box = Outbox()
    first = asyncio.create_task(box.take("p", "1", seconds=30))
    await asyncio.sleep(0)
    second = asyncio.create_task(box.take("p", "1", seconds=30))
    await asyncio.sleep(0)
    box.put("p", "1", ONE)
    assert await second is ONE
    with pytest.raises(Refused, match="not waited for"):
        await first


async def test_who_waits_at_a_place_that_closes_is_told() -> None:
    box = Outbox()
    waiting = asyncio.create_task(box.take("p", "1", seconds=30))
    other = asyncio.create_task(box.take("q", "1", seconds=30))
    await asyncio.sleep(0)
    box.put("p", "2", ONE)
    box.close("p")
    with pytest.raises(Refused, match="not waited for"):
        await waiting
    with pytest.raises(Refused, match="within"):
        await box.take("p", "2", seconds=0.01)
    box.put("q", "1", ONE)
    assert await other is ONE


async def test_what_nobody_collects_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "MAX_UNCOLLECTED", 2)
    box = Outbox()
    for item in "123":
        box.put("p", item, ONE)
    with pytest.raises(Refused, match="within"):
        await box.take("p", "1", seconds=0.01)
    assert await box.take("p", "3", seconds=30) is ONE
