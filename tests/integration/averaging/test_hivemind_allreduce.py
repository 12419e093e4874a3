"""Who is blamed when a class fails: those who broke it, not those who ended their streams because of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hivemind.p2p import PeerID
from hivemind.proto import averaging_pb2

from averaging.config import AveragingConfig
from averaging.exchange import ClassWork, UnitClass
from averaging.hivemind_allreduce import ClassRunner, Place
from averaging.hivemind_lost import LostPeer
from averaging.hivemind_servicer import AveragingServicer
from averaging.part_message import PartMessage
from averaging.robust import Segment
from blocks.spans import unit_of
from peers.network import PeerId

ANN, BOB, CAT = (PeerID(name) for name in (b"ann", b"bob", b"cat"))


def runner_of(me: PeerID) -> ClassRunner:
    p2p: Any = SimpleNamespace(peer_id=me)
    unit_class = UnitClass(
        class_id=b"class",
        holders=tuple(PeerId(peer.to_base58()) for peer in (ANN, BOB, CAT)),
        units=(unit_of("default", 0),),
    )
    return ClassRunner(
        place=Place(p2p=p2p, servicer_type=AveragingServicer, namespace="run"),
        work=ClassWork(
            unit_class=unit_class,
            vector=torch.ones(30_000),
            segments=(Segment(start=0, stop=30_000, shares=(0.25, 0.25, 0.5)),),
        ),
        peer_fractions=(1 / 3, 1 / 3, 1 / 3),
        config=AveragingConfig(),
    )


async def ended() -> AsyncIterator[PartMessage]:
    """A stream that ends without a word."""
    for message in ():
        yield message


async def answers_to(runner: ClassRunner, sender: PeerID) -> list[PartMessage]:
    context: Any = SimpleNamespace(remote_id=sender)
    return [answer async for answer in runner.rpc_aggregate_part(ended(), context)]


@pytest.mark.parametrize(("told", "blamed"), [(True, BOB), (False, ANN)])
async def test_a_stream_that_ends_is_blamed_only_when_nobody_says_who_broke_the_class(told: bool, blamed: PeerID):
    runner = runner_of(CAT)
    answering = asyncio.create_task(answers_to(runner, ANN))
    own_share = asyncio.create_task(runner._sum_own_share())
    await asyncio.sleep(0.05)
    assert not answering.done()
    if told:
        runner.tensor_part_reducer.fail(LostPeer(BOB, "sent nonsense"))
    async with asyncio.timeout(30):
        (answer,) = await answering
        with pytest.raises(LostPeer) as failure:
            await own_share
    assert answer.code == averaging_pb2.CANCELLED
    assert PeerID(answer.culprit) == failure.value.peer == blamed


@pytest.mark.parametrize(("told", "blamed"), [(True, BOB), (False, ANN)])
async def test_a_handler_that_is_cut_off_blames_its_sender_only_when_nobody_says_who_broke_the_class(
    told: bool, blamed: PeerID
):
    async def open_stream() -> AsyncIterator[PartMessage]:
        await asyncio.Event().wait()
        yield PartMessage()

    runner = runner_of(CAT)
    context: Any = SimpleNamespace(remote_id=ANN)
    answering = asyncio.create_task(anext(runner.rpc_aggregate_part(open_stream(), context)))
    own_share = asyncio.create_task(runner._sum_own_share())
    await asyncio.sleep(0.05)
    answering.cancel()
    await asyncio.sleep(0.05)
    assert not own_share.done()
    if told:
        runner.tensor_part_reducer.fail(LostPeer(BOB, "sent nonsense"))
    async with asyncio.timeout(30):
        with pytest.raises(LostPeer) as failure:
            await own_share
    assert failure.value.peer == blamed
