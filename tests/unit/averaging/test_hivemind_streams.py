"""A handler's requests after a reader of them was cut off."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from averaging.hivemind_streams import KeptStream


async def requests(queue: asyncio.Queue[int | None]) -> AsyncIterator[int]:
    while (item := await queue.get()) is not None:
        yield item


async def test_what_comes_after_a_reader_was_cancelled_is_still_read():
    queue: asyncio.Queue[int | None] = asyncio.Queue()
    kept = KeptStream(requests(queue))
    reading = asyncio.create_task(anext(kept))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    for item in (1, 2, None):
        queue.put_nowait(item)
    assert [item async for item in kept] == [1, 2]
    assert [item async for item in kept] == []  # and the end stays the end


async def test_draining_empties_the_stream_and_waits_a_bounded_time_for_the_other_side_to_close_it():
    queue: asyncio.Queue[int | None] = asyncio.Queue()
    kept = KeptStream(requests(queue))
    for item in range(20):
        queue.put_nowait(item)
    draining = asyncio.create_task(kept.drain(60))
    async with asyncio.timeout(30):
        while not queue.empty():  # noqa: ASYNC110 - the queue tells nobody
            await asyncio.sleep(0)
    queue.put_nowait(None)  # the end of what it says; who closes first here would take its last answer from it
    assert not (await asyncio.wait([draining], timeout=0.05))[0]
    draining.cancel()  # as hivemind does when the stream is closed
    with pytest.raises(asyncio.CancelledError):
        await draining
    await kept.drain(0.05)
    await kept.aclose()


async def test_a_stream_that_is_let_go_of_reads_no_more():
    queue: asyncio.Queue[int | None] = asyncio.Queue()
    kept = KeptStream(requests(queue))
    await kept.drain(0.01)
    await kept.aclose()
    await asyncio.sleep(0)
    queue.put_nowait(1)
    await asyncio.sleep(0)
    assert queue.qsize() == 1
