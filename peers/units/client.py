"""Fetching units from those who have them, where the newest version wins; and handing units to keepers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from blocks.errors import BlockError
from blocks.spans import UnitId
from blocks.unit_state import UnitState
from peers.errors import BadMessage, PeerLost, Refused
from peers.network import PeerId
from peers.streams.messages import Done, FetchUnit, KeepUnit, OfferUnits, StreamKind, UnitReply, Wanted
from peers.streams.pool import Pool
from peers.streams.values import Offer
from peers.units.transfer import Digest, packed, unpacked

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetching:
    """How units are fetched: `seconds` for one unit from one peer, and what it must be.

    `check` raises a BlockError for a state that cannot be the unit's. `lost` are peers that failed once: they are not
    asked again, so that one that stalls costs its deadline once and not once for each unit.
    """

    digest: Digest
    seconds: float
    moments: bool = False
    check: Callable[[UnitState], None] = lambda _: None
    lost: set[PeerId] = field(default_factory=set)


async def fetch_unit(pool: Pool, peer: PeerId, unit: UnitId, fetching: Fetching) -> UnitState:
    """One unit from one peer.

    Raises:
        PeerLost: the peer is gone or too slow, or what it sent cannot be right.
        Refused: it does not have the unit.
    """
    question = FetchUnit(unit=unit, moments=fetching.moments)
    answer = await pool.call(peer, StreamKind.UNITS, question, seconds=fetching.seconds)
    if not isinstance(answer.message, UnitReply):
        raise PeerLost(f"peer {peer} answered a fetch of {unit} with something else")
    try:
        state = await unpacked(answer.message, answer.tensors, unit, digest=fetching.digest)
        fetching.check(state)
    except (BadMessage, BlockError) as error:
        raise PeerLost(f"peer {peer} is not believed: {error}") from error
    return state


async def fetch_newest(pool: Pool, peers: Sequence[PeerId], unit: UnitId, fetching: Fetching) -> UnitState | None:
    """The newest version among the peers that answer; None when none does."""
    best: UnitState | None = None
    for peer in peers:
        if peer in fetching.lost:
            continue
        try:
            state = await fetch_unit(pool, peer, unit, fetching)
        except PeerLost as error:
            fetching.lost.add(peer)
            logger.warning("unit not fetched, the peer is not asked again unit=%s reason=%s", unit, error)
            continue
        except Refused as error:
            logger.info("unit not fetched unit=%s peer=%s reason=%s", unit, peer, error)
            continue
        if best is None or state.version > best.version:
            best = state
    return best


def offer_of(state: UnitState) -> Offer:
    """What a keeper is told before any tensor travels. The size counts AdamW's moments, read or not."""
    own = num_bytes_of(state.tensors)
    num_bytes = 3 * own + num_bytes_of(state.outer) + 4 * len(state.tensors)
    return Offer(state.unit, state.round, state.weight, state.digest, num_bytes)


def num_bytes_of(named: Mapping[str, torch.Tensor]) -> int:
    """What tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in named.values())


async def offer_units(pool: Pool, peer: PeerId, offers: Sequence[Offer], *, seconds: float) -> Wanted:
    """Ask a keeper which of at most MAX_OFFERS versions it lacks.

    Raises:
        PeerLost: it is gone or answers nonsense.
        Refused: it keeps nothing of ours now.
    """
    answer = await pool.call(peer, StreamKind.UNITS, OfferUnits(offers=tuple(offers)), seconds=seconds)
    if not isinstance(answer.message, Wanted):
        raise PeerLost(f"peer {peer} answered an offer of units with something else")
    return answer.message


async def hand_over(pool: Pool, peer: PeerId, state: UnitState, *, seconds: float) -> None:
    """Give one unit's state to a keeper; when this returns it is on the keeper's disk.

    Raises:
        PeerLost: it is gone or too slow.
        Refused: it does not take it.
    """
    message, tensors = packed(state, KeepUnit)
    answer = await pool.call(peer, StreamKind.UNITS, message, tensors, seconds=seconds)
    if not isinstance(answer.message, Done):
        raise PeerLost(f"peer {peer} answered {state.unit} with something else than that it is kept")
