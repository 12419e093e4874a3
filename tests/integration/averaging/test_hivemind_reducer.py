"""One part's way through the reducer, where hivemind's own reducer hangs, trusts or mixes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
import torch
from hivemind.averaging.partition import AllreduceException
from hivemind.p2p import PeerID

from averaging.codecs import make_codec
from averaging.hivemind_lost import LostPeer, blame
from averaging.hivemind_reducer import PartCodec, SumReducer

SHAPES = [torch.Size([4]), torch.Size([3])]


def total(part_index: int, pieces: Sequence[torch.Tensor | None]) -> torch.Tensor:
    return torch.stack([piece for piece in pieces if piece is not None]).sum(dim=0)


def reducer(num_senders: int = 3) -> SumReducer:
    codec = PartCodec(make_codec("fp32"))
    return SumReducer(SHAPES, num_senders, codec=codec, combine=total, settle=lambda index, exact, decoded: None)


async def test_a_sender_that_is_cut_off_does_not_cancel_what_the_others_wait_for():
    summing = reducer()
    waits = [asyncio.create_task(summing.accumulate_part(index, 0, torch.full((4,), 1.0))) for index in range(2)]
    await asyncio.sleep(0)
    waits[0].cancel()  # the stream of sender 0 has ended, and its handler with it
    async with asyncio.timeout(30):
        last = await summing.accumulate_part(2, 0, torch.full((4,), 2.0))
        assert torch.equal((await waits[1]).tensor, torch.full((4,), 4.0))
    assert last.tensor is waits[1].result().tensor  # encoded once: all decode the same bytes


async def test_a_claimed_weight_counts_for_nothing():
    summing = reducer(2)
    first = asyncio.create_task(summing.accumulate_part(0, 0, torch.ones(4), weight=1e9))
    await asyncio.sleep(0)
    result = await summing.accumulate_part(1, 0, torch.ones(4), weight=-5.0)
    assert torch.equal(result.tensor, torch.full((4,), 2.0))
    assert await first is result


async def test_a_failure_reaches_those_who_wait_and_those_who_come_later_but_not_what_is_summed():
    summing = reducer(2)
    done = asyncio.create_task(summing.accumulate_part(0, 0, torch.ones(4)))
    await asyncio.sleep(0)
    await summing.accumulate_part(1, 0, torch.ones(4))
    waiting = asyncio.create_task(summing.accumulate_part(0, 1, torch.ones(3)))
    await asyncio.sleep(0)
    summing.fail(AllreduceException("somebody is gone"))
    assert torch.equal((await done).tensor, torch.full((4,), 2.0))
    for call in (waiting, summing.accumulate_part(1, 1, torch.ones(3))):
        with pytest.raises(AllreduceException, match="somebody is gone"):
            await call


async def test_parts_out_of_order_and_sums_that_overflow_are_refused():
    summing = reducer(2)
    with pytest.raises(AllreduceException, match="out of order"):
        await summing.accumulate_part(0, 1, torch.ones(3))
    huge = torch.full((4,), 3e38)
    first = asyncio.create_task(summing.accumulate_part(0, 0, huge))
    await asyncio.sleep(0)
    for call in (summing.accumulate_part(1, 0, huge), first):
        with pytest.raises(AllreduceException, match="not finite"):
            await call


def test_a_class_that_failed_names_everybody_who_is_to_blame_once():
    ann, bob = (PeerID(name) for name in (b"ann", b"bob"))
    errors = [LostPeer(ann, "closed the stream"), OSError("x"), LostPeer(bob, "sent nonsense"), LostPeer(ann, "again")]
    reason, missing = blame(errors)
    assert reason == f"{ann.to_base58()} closed the stream; {bob.to_base58()} sent nonsense"
    assert missing == {ann, bob}
    assert blame([OSError("no route")]) == ("no route", set())
