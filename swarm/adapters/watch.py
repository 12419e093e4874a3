"""The owner's list of published adapters, at a running peer and on disk: read from the swarm, kept, passed on."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from peers.errors import BadRecord
from peers.published.catalogue import Catalogue, newest, open_catalogue
from swarm.errors import BadConfig
from swarm.run import RunId
from swarm.signed_lists import read_lists, save_list

logger = logging.getLogger(__name__)

LIST_NAME = "published.signed"  # in the owner's directory of the run, and in state directories of hosts
_STORE_SECONDS = 60.0
_LIFE_SECONDS = 600.0
_MAX_REFUSED = 4096


class CatalogueStore(Protocol):
    """Where peers leave the list for each other."""

    async def store_published(self, run: str, blob: bytes, expires_at: float) -> bool:
        """Keep a list until it expires (DHT time, in seconds)."""

    async def find_published(self, run: str) -> list[bytes]:
        """All lists that peers have stored."""


class CatalogueWatch:
    """One peer's newest list. `look` reads; whoever holds blocks, and the owner, pass it on by `keep`."""

    def __init__(
        self, store: CatalogueStore, owner: bytes, run: RunId, state: Path, dht_time: Callable[[], float]
    ) -> None:
        self.newest = Catalogue(run=run)
        self._store, self._owner, self._run, self._state, self._dht_time = store, owner, run, state, dht_time
        self._refused: OrderedDict[bytes, None] = OrderedDict()  # anybody may store anything: each is looked at once
        self._kept = self._stored = -1
        self._stored_at = float("-inf")

    async def look(self) -> Catalogue:
        """The newest list there is in the swarm, or that this peer knew before."""
        blobs = await self._store.find_published(self._run)
        self.newest = newest([self.newest, *await asyncio.to_thread(self._opened, blobs, "in the swarm")])
        return self.newest

    async def read(self, *directories: Path) -> Catalogue:
        """The newest list that is known, with those in this peer's state and in `directories`."""
        places = [self._state, *directories]
        found = await asyncio.to_thread(lambda: list(read_lists(places, LIST_NAME)))
        blobs = [blob for _, blob in found]
        self.newest = newest([self.newest, *await asyncio.to_thread(self._opened, blobs, "on disk")])
        return self.newest

    def take(self, catalogue: Catalogue) -> None:
        """Take the owner's own new list."""
        self.newest = newest([self.newest, catalogue])

    async def keep(self) -> bool:
        """Have the newest list on disk, and repeat it for others before it expires. Whether others took it."""
        known = self.newest
        if not known.blob:
            return True
        if known.number > self._kept:
            try:
                await asyncio.to_thread(save_list, self._state / LIST_NAME, known.blob)
                self._kept = known.number
            except BadConfig as error:
                logger.warning("%s", error)
        if known.number > self._stored or time.monotonic() > self._stored_at + _STORE_SECONDS:
            expires_at = self._dht_time() + _LIFE_SECONDS
            if await self._store.store_published(self._run, known.blob, expires_at):
                self._stored, self._stored_at = known.number, time.monotonic()
        return self._stored == known.number

    def _opened(self, blobs: Sequence[bytes], where: str) -> list[Catalogue]:
        found = []
        for blob in blobs:
            mark = hashlib.sha256(blob).digest()
            if blob == self.newest.blob or mark in self._refused:
                continue
            try:
                found.append(open_catalogue(blob, owner=self._owner, run=self._run))
            except BadRecord as error:
                self._refused[mark] = None
                if len(self._refused) > _MAX_REFUSED:
                    self._refused.popitem(last=False)
                logger.warning("a list of adapters was skipped where=%s reason=%s", where, error)
        return found
