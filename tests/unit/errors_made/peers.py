"""How to meet the errors between peers. Each gets an empty directory, and needs none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from peers.records import check_life
from peers.streams.messages import parse_message
from peers.streams.send_limit import SendLimit
from peers.streams.wire import read_frame


async def stream_ended() -> None:
    ended = asyncio.StreamReader()
    ended.feed_eof()
    await read_frame(ended)


async def send_much() -> None:
    limit = SendLimit(1000.0, name="bob")
    for _ in range(2):
        await limit.take(1_000_000, seconds=30)


MADE: dict[str, Callable[[Path], object]] = {
    "closed the stream": lambda path: asyncio.run(stream_ended()),
    "the bandwidth limit of": lambda path: asyncio.run(send_much()),
    "unknown message kind": lambda path: parse_message("gossip", {}),
    "a record expired": lambda path: check_life(1.0, 2.0),
}
