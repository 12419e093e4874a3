"""What a host takes on: which blocks, in how much memory, under the run's rules; and loads it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from blocks.adapters import all_unit_shapes, layout_digest
from blocks.checks import check_kind, check_whole, refuse
from blocks.errors import BadSpan
from blocks.part import block_parameters
from blocks.quantize import BYTES_PER_WEIGHT, Quantization
from blocks.source import ModelSource
from blocks.spans import Span
from peers.placing.placement import pick_span
from swarm.arguments import as_path
from swarm.devices import DEVICES, DTYPES, pick_device, pick_dtype
from swarm.errors import BadConfig
from swarm.hosts.host import Host, HostConfig, load_host, measure_block_rate
from swarm.hosts.hours import Hours, parse_hours
from swarm.hosts.memory import Allowance, Room, affordable
from swarm.hosts.memory_now import free_bytes
from swarm.run_model import check_weights, find_run_model
from swarm.run_rules import lora_settings, optimizer_config, unit_rules
from swarm.units.holder import RunRules

if TYPE_CHECKING:
    from swarm.node import Node

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class HostingConfig:
    """What a person says about one host. `span` None: the span that the swarm lacks most, as long as memory allows.

    `model` is a local copy of the run's model; it must be the same one. `dtype` auto is the run's, and so is a
    `lora_rank` of 0. `max_blocks` bounds how many blocks it takes; `max_memory_bytes`, this process with its weights,
    caches and work (on a GPU, what it takes there); `hours` are those of the day in which it takes part, also as text
    such as "22-07". None: no bound. `keep_bytes` of disk are for units that others hold; `resume` are state directories
    of dead peers whose units this host takes over.

    Raises:
        BadConfig: a value is of the wrong kind or out of range; the message names it.
    """

    cache_dir: Path
    span: Span | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantize: Quantization | None = None
    cache_bytes: int = 512 << 20
    num_threads: int | None = None
    nickname: str = ""
    model: str | None = None
    lora_rank: int = 0
    max_blocks: int | None = None
    max_memory_bytes: int | None = None
    hours: Hours | None = None
    keep_bytes: int = 1 << 30
    resume: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        self._set("cache_dir", as_path("cache_dir", self.cache_dir))
        check_kind(BadConfig, "span", self.span, (Span, type(None)), "swarm.Span(start, end), or None")
        for name, choices in (
            ("device", DEVICES),
            ("dtype", ("auto", *DTYPES)),
            ("quantize", (None, *BYTES_PER_WEIGHT)),
        ):
            if getattr(self, name) not in choices:
                refuse(BadConfig, name, getattr(self, name), f"one of {', '.join(map(str, choices))}")
        for name, low in (("cache_bytes", 1), ("lora_rank", 0), ("keep_bytes", 0)):
            check_whole(BadConfig, name, getattr(self, name), low)
        for name in ("num_threads", "max_blocks", "max_memory_bytes"):
            if getattr(self, name) is not None:
                check_whole(BadConfig, name, getattr(self, name), 1)
        check_kind(BadConfig, "nickname", self.nickname, str, "a string")
        check_kind(BadConfig, "model", self.model, (str, type(None)), "the path or the name of a model")
        self._set("hours", parse_hours(self.hours) if isinstance(self.hours, str) else self.hours)
        check_kind(BadConfig, "hours", self.hours, (Hours, type(None)), "times of day such as '22-07'")
        check_kind(BadConfig, "resume", self.resume, (tuple, list), "a list of state directories")
        self._set("resume", tuple(as_path("resume", each) for each in self.resume))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # still being born


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What one host is going to hold: `capacity` is the most blocks that it has room for."""

    source: ModelSource
    span: Span
    capacity: int
    room: Room
    device: torch.device
    dtype: torch.dtype


async def choose(node: Node, config: HostingConfig, *, taken_bytes: int) -> Load:
    """The span that a person has chosen, or else the one that the swarm lacks most, and the memory beside it.
    `taken_bytes` is what this process took before it held any block.

    Raises:
        BlockError: there is no such model here, or it has not so many blocks.
        SwarmError: it is another model than the run's, or what a person allows has no room for the blocks.
    """
    source = await asyncio.to_thread(find_run_model, node.spec, config.model, config.cache_dir)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, node.spec.model.compute_dtype, device)
    block_bytes = int(
        block_parameters(source) * (BYTES_PER_WEIGHT[config.quantize] if config.quantize else dtype.itemsize)
    )
    most = affordable(free_bytes(), block_bytes, source.num_blocks)
    room, allowance = Room(cache_bytes=config.cache_bytes), None
    if config.max_memory_bytes is not None:
        taken_bytes = taken_bytes if device.type == "cpu" else 0
        allowance = Allowance(most_bytes=config.max_memory_bytes, taken_bytes=taken_bytes, block_bytes=block_bytes)
        most = min(most, allowance.most_blocks())
    if config.max_blocks is not None:
        most = min(most, config.max_blocks)
    span = config.span or await _pick(node, source, most, _host_config(config, Span(0, 1), dtype, device))
    if span.end > source.num_blocks:
        raise BadSpan(f"span {span} ends after the {source.num_blocks} blocks of {source.name}; use fewer")
    if allowance is not None:
        room = allowance.room(len(span), room)
    return Load(source=source, span=span, capacity=most, room=room, device=device, dtype=dtype)


async def _pick(node: Node, source: ModelSource, most: int, config: HostConfig) -> Span:
    """The span that the swarm lacks most, and that suits this device's speed where there are others to be measured by:
    in the middle of their chains a slow one with room for many blocks would hold up all.
    """
    me, num_blocks = node.network.peer_id, source.num_blocks
    rate = None
    if most > 1 and any(record.peer != me for record in node.router.found):
        rate = await measure_block_rate(source, config, lora_settings(node.spec))
        logger.info("device measured block_rate=%.0f", rate)
    return pick_span(node.router.found, num_blocks, most, me=me, now=node.network.dht_time(), block_rate=rate)


def _host_config(config: HostingConfig, span: Span, dtype: torch.dtype, device: torch.device) -> HostConfig:
    """How a span is computed here."""
    return HostConfig(span=span, dtype=dtype, device=device, quantize=config.quantize, num_threads=config.num_threads)


async def load(node: Node, chosen: Load, config: HostingConfig) -> Host:
    """Load it, and start from the run's seed or from what is left on disk.

    Raises:
        BlockError: the model, the span or the adapter settings do not fit.
        SwarmError: the state directory or the weights belong to something else.
    """
    source, span, room = chosen.source, chosen.span, chosen.room
    await asyncio.to_thread(check_weights, source, node.spec, span.blocks())
    logger.info("model found name=%s blocks=%s", source.name, span)
    host = await load_host(
        source,
        replace(
            _host_config(config, span, chosen.dtype, chosen.device),
            cache_bytes=room.cache_bytes,
            limits=room.limits,
            keep_bytes=config.keep_bytes,
            resume=config.resume,
        ),
        await run_rules(node, source, config.lora_rank),
        node.config.state,
    )
    logger.info("loaded blocks=%s dtype=%s quantize=%s device=%s", span, chosen.dtype, config.quantize, chosen.device)
    return host


async def run_rules(node: Node, source: ModelSource, own_rank: int = 0) -> RunRules:
    """What the run prescribes to every holder; a host may train a smaller rank of its own (0: the run's)."""
    spec = node.spec
    lora = lora_settings(spec, own_rank=own_rank)
    shapes = await asyncio.to_thread(all_unit_shapes, lora, source)
    return RunRules(
        run=node.config.run,
        layout=layout_digest(lora, source, shapes).hex(),
        lora=lora,
        optimizer=optimizer_config(spec),
        batch_size=spec.training.batch_size,
        units=unit_rules(spec, shapes),
        shapes=shapes,
    )
