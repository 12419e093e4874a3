"""Routes for texts with a published adapter: through hosts that say that they serve it, and no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from blocks.spans import Span
from peers.errors import NoRoute
from peers.network import PeerId
from peers.published.catalogue import Published
from peers.records import PeerRecord
from peers.routes.paces import Paces
from peers.routes.routing import Hop, HostView, RouteRules, missing_blocks, pick_fast


class Routes(Protocol):
    """What this needs of `router.LiveRouter`."""

    paces: Paces

    def views(self, only: Callable[[PeerRecord], bool]) -> list[HostView]:
        """The hosts whose record passes."""

    async def wait_for(
        self, pick: Callable[[RouteRules], tuple[Hop, ...]], avoid: frozenset[PeerId]
    ) -> tuple[Hop, ...]:
        """What `pick` finds under the rules of now; again while it raises NoRoute, until a deadline."""

    def is_slow(self, hop: Hop, views: list[HostView] | None = None) -> bool:
        """See router.Router; among `views`."""

    def failed(self, peer: PeerId, reason: str) -> None:
        """See router.Router."""

    async def refused(self, hop: Hop, reason: str) -> None:
        """See router.Router."""


class AdapterRouter:
    """Implements router.Router for one adapter."""

    def __init__(self, routes: Routes, adapter: Published) -> None:
        self._routes, self._adapter = routes, adapter
        self.paces = routes.paces

    async def spread(self, span: Span, num_tokens: int) -> tuple[Hop, ...]:
        """See Router; nobody trains a published adapter."""
        return await self.fast(span)

    async def fast(self, span: Span, avoid: frozenset[PeerId] = frozenset()) -> tuple[Hop, ...]:
        """See Router."""
        return await self._routes.wait_for(lambda rules: self._pick(span, rules), avoid)

    def is_slow(self, hop: Hop) -> bool:
        """See Router."""
        return self._routes.is_slow(hop, self._views())

    def failed(self, peer: PeerId, reason: str) -> None:
        """See Router."""
        self._routes.failed(peer, reason)

    async def refused(self, hop: Hop, reason: str) -> None:
        """See Router."""
        await self._routes.refused(hop, reason)

    def with_adapter(self, adapter: Published) -> AdapterRouter:
        """See Router."""
        return AdapterRouter(self._routes, adapter)

    def _views(self) -> list[HostView]:
        mark = self._adapter.mark
        return self._routes.views(lambda record: mark in record.adapters)

    def _pick(self, span: Span, rules: RouteRules) -> tuple[Hop, ...]:
        views = self._views()
        gaps = missing_blocks(views, span, rules)
        if gaps:
            raise NoRoute(
                f"nobody who holds blocks {', '.join(map(str, gaps))} serves adapter '{self._adapter.name}' now; "
                "`swarm status` shows how many have it, and they fetch it from each other or while `swarm publish` runs"
            )
        return pick_fast(views, span, rules=rules)
