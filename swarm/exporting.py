"""Gathering every unit of the run from its holders, and writing it as a peft adapter."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from blocks.adapters import all_unit_shapes, check_unit, unit_digest
from blocks.export import export_adapter
from blocks.spans import parse_unit
from blocks.unit_state import UnitState
from peers.errors import NoRoute
from peers.unit_client import fetch_newest
from swarm.run_model import find_run_model
from swarm.run_rules import lora_settings

if TYPE_CHECKING:
    from swarm.node import Node
    from swarm.peer import PeerConfig

logger = logging.getLogger(__name__)

_FETCH_SECONDS = 60.0


async def export(node: Node, config: PeerConfig, directory: Path) -> int:
    """See Peer.export."""
    source = await asyncio.to_thread(find_run_model, node.spec, config.model, config.cache_dir)
    lora = lora_settings(node.spec)
    shapes = await asyncio.to_thread(all_unit_shapes, lora, source)
    await node.router.refresh()
    found: dict[str, UnitState] = {}
    for unit in shapes:
        block = parse_unit(unit)[1]
        holders = [record.peer for record in node.router.records if block in record.span]
        state = await fetch_newest(node.pool, holders, unit, moments=False, digest=unit_digest, seconds=_FETCH_SECONDS)
        if state is None:
            raise NoRoute(
                f"no holder of block {block} answers; export again when one is back (`swarm status` shows them)"
            )
        check_unit(unit, state.tensors, shapes[unit])
        found[unit] = state
    rounds = {state.round for state in found.values()}
    if len(rounds) > 1:
        logger.warning("units stand at different rounds: %s; the newest of each is exported", sorted(rounds))
    tensors = {unit: found[unit].tensors for unit in shapes}
    await asyncio.to_thread(export_adapter, tensors, lora, source, directory)
    return max(rounds)
