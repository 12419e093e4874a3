"""Routes of a peer that holds every block: through itself, so that only adapters leave it."""

from __future__ import annotations

import logging
import time

from blocks.spans import Span
from peers.errors import NoRoute
from peers.network import PeerId
from peers.published.catalogue import Published
from peers.routes.paces import Paces
from peers.routes.routing import Hop

logger = logging.getLogger(__name__)


class OwnRouter:
    """Implements router.Router with a chain of one."""

    def __init__(self, me: PeerId) -> None:
        self._me = me
        self.paces = Paces(time.monotonic)

    async def spread(self, span: Span, num_tokens: int) -> tuple[Hop, ...]:
        """See Router."""
        return (Hop(peer=self._me, span=span),)

    async def fast(self, span: Span, avoid: frozenset[PeerId] = frozenset()) -> tuple[Hop, ...]:
        """See Router; there is nobody to take in place of oneself."""
        if self._me in avoid:
            raise NoRoute(f"this peer, which holds all blocks {span} of its texts, has refused; see the log")
        return (Hop(peer=self._me, span=span),)

    def is_slow(self, hop: Hop) -> bool:
        """See Router; there is nobody else."""
        return False

    def with_adapter(self, adapter: Published) -> OwnRouter:
        """See Router; this peer's texts do not leave it for another adapter either."""
        return self

    def failed(self, peer: PeerId, reason: str) -> None:
        """See Router."""
        logger.warning("a call to this peer itself failed: %s", reason)

    async def refused(self, hop: Hop, reason: str) -> None:
        """See Router; what a peer refuses itself it is told at once."""
        self.failed(hop.peer, reason)
