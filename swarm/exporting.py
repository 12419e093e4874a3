"""Gathering every unit of the run, from live peers or from directories, and writing it as a peft adapter."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from blocks.adapters import LoraSettings, all_unit_shapes, layout_digest, unit_digest
from blocks.export import check_place, export_adapter
from blocks.source import ModelSource
from blocks.spans import UnitId, parse_unit
from blocks.unit_state import UnitState
from peers.errors import NoRoute
from peers.units.client import Fetching, fetch_newest
from peers.units.keeping import keepers_with
from swarm.errors import BadCheckpoint
from swarm.join_string import Join, RunDirectory
from swarm.run_model import find_run_model
from swarm.run_rules import lora_settings
from swarm.units.book import check_state
from swarm.units.left_states import find_left, left_settings

if TYPE_CHECKING:
    from swarm.node import Node
    from swarm.peer_config import PeerConfig

logger = logging.getLogger(__name__)

_FETCH_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftBehind:
    """An export without a swarm: `directories` are what peers of the run `target` left; `model` is a local copy."""

    target: Join | RunDirectory
    directories: tuple[Path, ...]
    cache_dir: Path
    model: str | None = None


async def export(node: Node, config: PeerConfig, directory: Path) -> int:
    """See Peer.export."""
    check_place(directory)
    source = await asyncio.to_thread(find_run_model, node.spec, config.model, config.cache_dir)
    lora = lora_settings(node.spec)
    shapes = await asyncio.to_thread(all_unit_shapes, lora, source)
    await node.router.refresh()
    progress = await node.directory.find_progress(node.config.run, node.whole)
    fetching = Fetching(digest=unit_digest, seconds=_FETCH_SECONDS, check=lambda state: check_state(state, shapes))
    found: dict[UnitId, UnitState] = {}
    for unit in shapes:
        block = parse_unit(unit)[1]
        holders = [record.peer for record in node.router.records if block in record.span]
        peers = [*holders, *keepers_with(progress, block)]
        state = await fetch_newest(node.pool, peers, unit, fetching)
        if state is None:  # a keeper's record is a second behind what it keeps
            others = [record.peer for record in progress if record.peer not in peers and not record.behind_nat]
            state = await fetch_newest(node.pool, others, unit, fetching)
        if state is None:
            raise NoRoute(
                f"no holder and no keeper of block {block} answers; export again when one is back (`swarm status` "
                "shows them), or --from the state directory of one"
            )
        found[unit] = state
    return await asyncio.to_thread(_write, found, lora, source, directory)


def export_left(left: LeftBehind, directory: Path) -> int:
    """Write the newest adapter that dead peers' state directories hold, as Peer.export does; returns its round.

    Raises:
        BadCheckpoint: a directory holds no whole state, or that of another run or model, or blocks are in none of them.
        BadConfig, BadRecord, UnknownModel: the run's settings or its model cannot be found.
    """
    check_place(directory)
    run, spec = left_settings(left.target, left.directories)
    source = find_run_model(spec, left.model, left.cache_dir)
    lora = lora_settings(spec)
    shapes = all_unit_shapes(lora, source)
    found = find_left(left.directories, run=run, layout=layout_digest(lora, source, shapes).hex())
    missing = sorted(parse_unit(unit)[1] for unit in shapes.keys() - found.units.keys())
    if missing:
        raise BadCheckpoint(
            f"blocks {', '.join(map(str, missing))} are in none of {_names(left.directories)}; "
            "add the state directory of a peer that held or kept them, with --from"
        )
    return _write({unit: found.units[unit] for unit in shapes}, lora, source, directory)


def _write(found: Mapping[UnitId, UnitState], lora: LoraSettings, source: ModelSource, directory: Path) -> int:
    rounds = {state.round for state in found.values()}
    if len(rounds) > 1:
        logger.warning("units stand at different rounds: %s; the newest of each is exported", sorted(rounds))
    export_adapter({unit: state.tensors for unit, state in found.items()}, lora, source, directory)
    return max(rounds)


def _names(directories: tuple[Path, ...]) -> str:
    return ", ".join(map(str, directories))
