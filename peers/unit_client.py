"""Fetching units from their holders: the newest version wins, and what does not match its digest is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch

from blocks.spans import UnitId
from blocks.unit_state import UnitState, agreed, split
from peers.errors import BadMessage, PeerLost, Refused
from peers.messages import FetchUnit, StreamKind, UnitReply
from peers.network import PeerId
from peers.pool import Pool

logger = logging.getLogger(__name__)

Digest = Callable[[Mapping[str, torch.Tensor]], bytes]


async def fetch_unit(
    pool: Pool, peer: PeerId, unit: UnitId, *, moments: bool, digest: Digest, seconds: float
) -> UnitState:
    """One unit from one holder.

    Raises:
        PeerLost: the holder is gone, or what it sent does not match its own digest.
        Refused: it does not hold the unit.
    """
    answer = await pool.call(peer, StreamKind.UNITS, FetchUnit(unit=unit, moments=moments), seconds=seconds)
    reply = answer.message
    if not isinstance(reply, UnitReply) or reply.unit != unit or len(reply.names) != len(answer.tensors):
        raise PeerLost(f"peer {peer} answered a fetch of {unit} with something else")
    if len(set(reply.names)) != len(reply.names) or reply.weight < 0:
        raise PeerLost(f"peer {peer} sent {unit} with doubled names or a negative weight")
    named = dict(zip(reply.names, answer.tensors, strict=True))
    tensors, outer, own_moments = split(named)
    if digest(agreed(tensors, outer)) != reply.digest:
        raise PeerLost(f"peer {peer} sent {unit} with a digest that does not match its tensors")
    return UnitState(
        unit=unit,
        round=reply.round,
        weight=reply.weight,
        total_samples=reply.total_samples,
        digest=reply.digest,
        tensors=tensors,
        outer=outer,
        moments=own_moments,
    )


async def fetch_newest(
    pool: Pool, holders: Sequence[PeerId], unit: UnitId, *, moments: bool, digest: Digest, seconds: float
) -> UnitState | None:
    """The newest version among the holders that answer; None when none does."""
    best: UnitState | None = None
    for peer in holders:
        try:
            state = await fetch_unit(pool, peer, unit, moments=moments, digest=digest, seconds=seconds)
        except (PeerLost, Refused, BadMessage) as error:
            logger.info("unit not fetched unit=%s peer=%s reason=%s", unit, peer, error)
            continue
        if best is None or state.version > best.version:
            best = state
    return best
