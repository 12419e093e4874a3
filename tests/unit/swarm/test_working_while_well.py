"""A long work ends when its node cannot go on, and with what has ended the node."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from peers.errors import BadMembership, NoRoute
from swarm.node import Node
from swarm.training import jobs as training
from swarm.training.jobs import while_well


class Ill:
    """A node that cannot go on once it is told so."""

    over = False

    def check(self) -> None:
        if self.over:
            raise BadMembership("it is over")


async def test_a_work_that_waits_in_vain_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_CHECK_SECONDS", 0.001)
    node, begun, ended = Ill(), asyncio.Event(), asyncio.Event()

    async def wait_in_vain() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with asyncio.timeout(20):
        work = asyncio.create_task(while_well(cast(Node, node), wait_in_vain()))
        await begun.wait()
        node.over = True
        with pytest.raises(BadMembership):
            await work
    assert ended.is_set()


async def test_a_work_that_ends_by_itself_says_what_it_has_to_say() -> None:
    async def done() -> int:
        return 7

    async def failed() -> None:
        raise NoRoute("no host")

    node = cast(Node, Ill())
    assert await while_well(node, done()) == 7
    with pytest.raises(NoRoute):
        await while_well(node, failed())


async def test_who_waits_may_give_up() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    work = asyncio.create_task(while_well(cast(Node, Ill()), wait()))
    async with asyncio.timeout(20):
        await begun.wait()
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
    assert ended.is_set()
