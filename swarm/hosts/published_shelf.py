"""Published adapters in one host's model: versions of the LoRA beside the snapshots of the one that is trained.

Implements peers.published.service.SharedSource, from what is on disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from blocks.adapters import add_version, drop_version
from blocks.load import SpanModel
from blocks.spans import UnitId, unit_of
from blocks.unit_state import UnitState
from blocks.worker import ComputeThread, Priority
from peers.published.content import content_named
from swarm.adapters.files import AdapterFiles

_LABEL = "published-"
_LABEL_DIGITS = 48


@dataclass(frozen=True, slots=True)
class _Served:
    label: str
    listed: bytes


@dataclass(frozen=True, slots=True)
class ShelfParts:
    """What the shelf works with. `adapter` names the units in the model, as the run's settings do."""

    model: SpanModel
    thread: ComputeThread
    adapter: str
    files: AdapterFiles


class PublishedShelf:
    """The adapters that are served here, by content. `end_version` frees what still decodes with a label."""

    def __init__(self, parts: ShelfParts) -> None:
        self._parts = parts
        self._served: dict[bytes, _Served] = {}
        self.end_version: Callable[[str], Awaitable[None]] = _nobody

    def __len__(self) -> int:
        return len(self._served)

    def contents(self) -> tuple[bytes, ...]:
        """What is served."""
        return tuple(self._served)

    def label(self, content: bytes) -> str | None:
        """The version of the model that an adapter is, or None."""
        served = self._served.get(content)
        return None if served is None else served.label

    def content(self, content: bytes) -> bytes | None:
        """See SharedSource."""
        served = self._served.get(content)
        return None if served is None else served.listed

    async def read_unit(self, unit: UnitId, *, moments: bool) -> UnitState | None:
        """See SharedSource; also of blocks that are not held here, where the unit is on disk."""
        named = content_named(unit)
        if named is None or named[0] not in self._served:
            return None
        return await asyncio.to_thread(self._parts.files.unit, *named)

    async def add(self, content: bytes, listed: bytes, units: Mapping[int, UnitState]) -> None:
        """Serve an adapter, whose `units` were checked.

        Raises:
            BadAdapter: they do not fit, or there are too many versions.
            MemoryError, torch.OutOfMemoryError: there is no room on the device.
        """
        parts, label = self._parts, _LABEL + content.hex()[:_LABEL_DIGITS]
        tensors = {unit_of(parts.adapter, block): state.tensors for block, state in units.items()}
        await parts.thread.run(Priority.STEP, lambda: add_version(parts.model, label, tensors))
        self._served[content] = _Served(label, listed)

    async def drop(self, content: bytes) -> None:
        """Serve an adapter no more; its texts end."""
        served = self._served.pop(content)
        await self.end_version(served.label)
        await self._parts.thread.run(Priority.STEP, lambda: drop_version(self._parts.model, served.label))


async def _nobody(label: str) -> None:
    return None
