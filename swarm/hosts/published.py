"""Keeps a host's published adapters as the owner's list says: fetches what is new, lets go of what was withdrawn.

Of its own blocks a host has units in memory and on disk, of the others on disk as far as it has room: so that an
adapter outlives the last holder of a block.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from blocks.adapters import block_of, check_unit, unit_digest
from blocks.errors import BadAdapter
from blocks.spans import Span, UnitId, unit_of
from blocks.unit_state import UnitState
from peers.published.catalogue import Catalogue, Published
from peers.published.client import SharedFetching, fetch_content, fetch_shared
from peers.published.content import shared_unit
from peers.records import PeerRecord
from peers.streams.pool import Pool
from swarm.adapters.files import AdapterFiles
from swarm.errors import BadCheckpoint
from swarm.hosts.memory import AdapterRoom
from swarm.hosts.published_shelf import PublishedShelf
from swarm.reports.traffic import size_words

logger = logging.getLogger(__name__)

LOOK_SECONDS = 3.0
_FETCH_SECONDS = 60.0
_AGAIN_SECONDS = 15.0  # after whoever says to have an adapter did not give it, or this host could not take it
_SPARES_AT_ONCE = 8
_MOST_ASKED = 16  # peers at one try, each of which may take its time to give nothing
_FP32_BYTES = 4
Shapes = Mapping[UnitId, Mapping[str, tuple[int, ...]]]


class Watch(Protocol):
    """What it needs of swarm.adapters.watch.CatalogueWatch."""

    async def look(self) -> Catalogue:
        """The newest list that peers have."""

    async def read(self) -> Catalogue:
        """The newest list on disk."""

    async def keep(self) -> bool:
        """Have the newest list on disk, and pass it on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedParts:
    """What a host lends. `records` are all that its router found; `announce` tells the others what it serves now.
    `shapes` and the name `adapter` are those of the run's own; `spare_bytes` of disk are for units of others' blocks.
    """

    watch: Watch
    shelf: PublishedShelf
    files: AdapterFiles
    span: Span
    shapes: Shapes
    adapter: str
    room: AdapterRoom
    spare_bytes: int
    pool: Pool
    records: Callable[[], Sequence[PeerRecord]]
    announce: Callable[[], Awaitable[None]]


class PublishedAdapters:
    """One host's side of the list. `begin` before it announces itself, then `run` in a task."""

    def __init__(self, parts: PublishedParts, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._parts, self._clock = parts, clock
        self._sizes = num_bytes_by_block(parts.shapes)
        self._own = [block for block in self._sizes if block in parts.span]
        self._listed: tuple[Published, ...] = ()
        self._tidied: frozenset[bytes] | None = None
        self._said: set[tuple[bytes, str]] = set()
        self._again_at: dict[bytes, float] = {}
        self._here: dict[bytes, set[int]] = {}  # blocks of which there is a file

    def marks(self) -> tuple[bytes, ...]:
        """What this host's record says that it serves."""
        served = self._parts.shelf.contents()
        return tuple(sorted({each.mark for each in self._listed if each.content in served}))

    async def begin(self) -> None:
        """Serve what is left on disk of the adapters on the newest list there."""
        self._listed = (await self._parts.watch.read()).adapters
        for adapter in self._listed:
            self._here[adapter.content] = set(await asyncio.to_thread(self._parts.files.here, adapter.content))
            await self._take(adapter, [])

    async def run(self) -> None:
        """Follow the list, until cancelled."""
        while True:
            await self.follow()
            await asyncio.sleep(LOOK_SECONDS)

    async def follow(self) -> None:
        """Take what is new on the list and can be had now, drop what is no more on it."""
        shelf, watch = self._parts.shelf, self._parts.watch
        self._listed = (await watch.look()).adapters
        await watch.keep()
        wanted = frozenset(each.content for each in self._listed)
        before = set(shelf.contents())
        for content in before - wanted:
            await shelf.drop(content)
            logger.info("published adapter withdrawn content=%s", content.hex()[:16])
        if wanted != self._tidied:
            await asyncio.to_thread(self._parts.files.keep_only, wanted)
            self._tidied = wanted
            self._here = {content: blocks for content, blocks in self._here.items() if content in wanted}
        self._again_at = {content: at for content, at in self._again_at.items() if content in wanted}
        for adapter in self._listed:
            if self._again_at.get(adapter.content, 0.0) > self._clock():
                continue
            if adapter.content in shelf.contents():
                await self._keep_spares(adapter, self._parts.records())
            else:
                await self._take(adapter, self._parts.records())
        if set(shelf.contents()) != before:
            await self._parts.announce()

    async def _take(self, adapter: Published, records: Sequence[PeerRecord]) -> None:
        """Serve an adapter, if there is room and all of it can be had: from disk, or from the peers of `records`."""
        parts = self._parts
        right, needed = sum(self._sizes.values()), sum(self._sizes[block] for block in self._own)
        if adapter.num_bytes != right:
            self._say_once(adapter, f"the list says {adapter.num_bytes} bytes, an adapter of this run has {right}")
            return
        if not parts.room.has(needed, already=needed * len(parts.shelf)):
            self._say_once(adapter, f"it needs {size_words(needed)} of memory, which are not left; see --max-memory")
            return
        try:
            found = await self._collected(adapter, self._own, records)
            if found is not None:
                await parts.shelf.add(adapter.content, *found)
                logger.info("published adapter served name=%s content=%s", adapter.name, adapter.content.hex()[:16])
        except (BadCheckpoint, BadAdapter) as error:
            self._say_once(adapter, str(error))
        except (MemoryError, torch.OutOfMemoryError):
            self._say_once(adapter, "its device has no memory left")

    async def _keep_spares(self, adapter: Published, records: Sequence[PeerRecord]) -> None:
        """Have units of blocks that this host does not hold, a few at a time, as far as there is room on disk."""
        own = set(self._own)
        used = sum(self._sizes[block] for blocks in self._here.values() for block in blocks - own)
        some = sorted(self._sizes.keys() - own - self._here.get(adapter.content, set()))[:_SPARES_AT_ONCE]
        if not some or used + sum(self._sizes[block] for block in some) > self._parts.spare_bytes:
            return
        try:
            await self._collected(adapter, some, records)
        except BadCheckpoint as error:
            self._say_once(adapter, str(error))

    async def _collected(
        self, adapter: Published, blocks: Collection[int], records: Sequence[PeerRecord]
    ) -> tuple[bytes, dict[int, UnitState]] | None:
        """An adapter's list of digests and its units of `blocks`, all of them on disk then; None where some cannot be
        had now.

        Raises:
            BadCheckpoint: the disk is full or read-only.
        """
        files, content = self._parts.files, adapter.content
        listed = await asyncio.to_thread(files.listed, content)
        stored = {block: await asyncio.to_thread(files.unit, content, block) for block in blocks}
        units = {block: state for block, state in stored.items() if state is not None}
        self._here.setdefault(content, set()).update(units)
        missing = [block for block in blocks if block not in units]
        if listed is not None and not missing:
            return listed, units
        having = [each for each in records if adapter.mark in each.adapters and each.peer != self._parts.pool.me]
        if not having:
            return None
        self._again_at[content] = self._clock() + _AGAIN_SECONDS
        random.shuffle(having)  # so that not all ask the same one first
        fetching = SharedFetching(
            blocks=list(self._sizes), digest=unit_digest, check=self._check, seconds=_FETCH_SECONDS
        )
        if listed is None:
            peers = [each.peer for each in having[:_MOST_ASKED]]
            listed = await fetch_content(self._parts.pool, peers, adapter, fetching)
            if listed is None:
                return None
            await asyncio.to_thread(files.save_list, content, listed)
        for block in missing:
            holders = sorted(having, key=lambda each: block not in each.span)  # others may have it on disk
            peers = [each.peer for each in holders[:_MOST_ASKED]]
            state = await fetch_shared(self._parts.pool, peers, shared_unit(content, block), listed, fetching)
            if state is None:
                return None
            await asyncio.to_thread(files.save_unit, content, block, state)
            self._here[content].add(block)
            units[block] = state
        del self._again_at[content]
        return listed, units

    def _check(self, block: int, state: UnitState) -> None:
        check_unit(state.unit, state.tensors, self._parts.shapes[unit_of(self._parts.adapter, block)])

    def _say_once(self, adapter: Published, why: str) -> None:
        self._again_at[adapter.content] = self._clock() + _AGAIN_SECONDS
        if (adapter.content, why) not in self._said:
            self._said.add((adapter.content, why))
            logger.warning("adapter '%s' is not served here: %s", adapter.name, why)


def num_bytes_by_block(shapes: Shapes) -> dict[int, int]:
    """What an adapter's tensors take in each block that has some, in order."""
    sizes = {block_of(unit): sum(rows * columns for rows, columns in named.values()) for unit, named in shapes.items()}
    return {block: _FP32_BYTES * sizes[block] for block in sorted(sizes)}
