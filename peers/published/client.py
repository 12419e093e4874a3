"""Fetching published adapters from whoever has them: the list of digests first, then unit by unit, each checked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from blocks.errors import BadAdapter
from blocks.spans import UnitId
from blocks.unit_state import UnitState
from peers.errors import BadRecord, PeerLost, Refused
from peers.network import PeerId
from peers.published.catalogue import Published
from peers.published.content import check_bare, content_named, read_content
from peers.streams.messages import AskContent, ContentReply, StreamKind
from peers.streams.pool import Pool
from peers.units.client import Fetching, fetch_newest
from peers.units.transfer import Digest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedFetching:
    """How adapters are fetched: `seconds` for one answer. `blocks` are those in which the run's adapter has a unit;
    `check` raises a BlockError for tensors that cannot be the unit's. `lost` are peers that failed or lied once: they
    are not asked again.
    """

    blocks: Sequence[int]
    digest: Digest
    check: Callable[[int, UnitState], None]
    seconds: float
    lost: set[PeerId] = field(default_factory=set)


async def fetch_content(
    pool: Pool, peers: Sequence[PeerId], adapter: Published, fetching: SharedFetching
) -> bytes | None:
    """The list of an adapter's digests from the first peer that has the right one; None where none has."""
    question = AskContent(content=adapter.content)
    for peer in peers:
        try:
            answer = await pool.call(peer, StreamKind.UNITS, question, seconds=fetching.seconds)
            if not isinstance(answer.message, ContentReply):
                raise PeerLost(f"peer {peer} answered a question for an adapter with something else")
            read_content(answer.message.digests, adapter.content, fetching.blocks)
        except Refused as error:
            logger.info("adapter not fetched name=%s peer=%s reason=%s", adapter.name, peer, error)
        except (PeerLost, BadRecord) as error:
            fetching.lost.add(peer)
            logger.warning("adapter not fetched name=%s peer=%s reason=%s", adapter.name, peer, error)
        else:
            return answer.message.digests
    return None


async def fetch_shared(
    pool: Pool, peers: Sequence[PeerId], unit: UnitId, listed: bytes, fetching: SharedFetching
) -> UnitState | None:
    """A unit of a published adapter, from the first peer who gives the right one; None where none does. `listed` are
    the adapter's digests.

    Raises:
        BadRecord: these are not the list of that adapter.
    """
    named = content_named(unit)
    if named is None:
        raise BadRecord(f"{unit} is not of a published adapter")
    content, block = named
    expected = read_content(listed, content, fetching.blocks).get(block)

    def check(state: UnitState) -> None:
        try:
            check_bare(state)
        except BadRecord as error:
            raise BadAdapter(str(error)) from error
        if state.digest != expected:
            raise BadAdapter(f"{state.unit} has another digest than the owner's list says")
        fetching.check(block, state)

    one = Fetching(digest=fetching.digest, seconds=fetching.seconds, check=check, lost=fetching.lost)
    for peer in peers:
        state = await fetch_newest(pool, [peer], unit, one)
        if state is not None:
            return state
    return None
