"""A node that holds blocks: choose and load the span, catch up, serve, announce, take part in rounds."""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from averaging.averager import Averager, Link
from averaging.hivemind_exchange import HivemindExchange
from blocks.adapters import layout_digest
from blocks.errors import BadSpan
from blocks.part import block_parameters
from blocks.quantize import BYTES_PER_WEIGHT, Quantization
from blocks.source import ModelSource
from blocks.spans import Span
from peers.decode_service import DecodeParts, DecodeService
from peers.edge import Edge
from peers.errors import NetworkFailed
from peers.messages import PROTOCOL_MAX, PROTOCOL_MIN, StreamKind
from peers.placement import pick_span
from peers.records import MAX_ADDRESSES, PeerRecord, seal_record
from peers.train_service import TrainService
from peers.units_service import UnitsService
from swarm.devices import pick_device, pick_dtype
from swarm.errors import BadCheckpoint
from swarm.host import Host, HostConfig, RunRules, load_host
from swarm.rounds import KeeperConfig, RoundKeeper, Surroundings
from swarm.run_model import check_weights, find_run_model
from swarm.run_rules import averaging_config, lora_settings, optimizer_config, unit_rules

if TYPE_CHECKING:
    from swarm.node import Node

logger = logging.getLogger(__name__)

RECORD_LIFE_SECONDS = 60.0
_SWEEP_SECONDS = 5.0
_MEMORY_SHARE = 0.5  # of what is free now, for frozen weights; the rest is for activations and caches


@dataclass(frozen=True, kw_only=True, slots=True)
class HostingConfig:
    """What a person says about one host. `span` None: the span that the swarm lacks most, as long as memory allows.

    `model` is a local copy of the run's model; it must be the same one. `dtype` auto is the run's, and so is a
    `lora_rank` of 0.
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


class Announcer:
    """Keeps this peer's record in the directory: at once on change, and before it expires."""

    def __init__(self, node: Node, host: Host, config: HostingConfig) -> None:
        self._node, self._host, self._config = node, host, config
        self.sealed = b""

    async def run(self) -> None:
        """Announce again until cancelled; the first time was before."""
        while True:
            said = self._host.round
            for _ in range(int(RECORD_LIFE_SECONDS / 2)):
                await asyncio.sleep(1.0)
                if self._host.round != said:
                    break
            await self.announce()

    async def announce(self, *, leaving: bool = False) -> None:
        """Publish the record as of now; `leaving` says that this peer is a host no more."""
        host, node = self._host, self._node
        record = PeerRecord(
            run=node.config.run,
            peer=node.network.peer_id,
            span=host.span,
            tokens_per_second=host.tokens_per_second,
            backward_tokens_per_second=host.backward_tokens_per_second,
            queue_seconds=min(600.0, host.thread.backlog() / max(host.tokens_per_second, 1e-3)),
            round=host.round,
            cache_free_bytes=max(0, host.caches.free_bytes),
            addresses=(await node.network.addresses())[:MAX_ADDRESSES],
            protocol=(PROTOCOL_MIN, PROTOCOL_MAX),
            software=node.hello().software,
            dtype=host.config.quantize or str(host.config.dtype).removeprefix("torch."),
            nickname=self._config.nickname,
            # The DHT keeps what expires last, so a goodbye is a newer record without the role, not a shorter one.
            roles=() if leaving else ("host",),
            expires_at=node.network.dht_time() + RECORD_LIFE_SECONDS,
        )
        self.sealed = seal_record(node.network.identity, record)
        await node.directory.publish(record)


class Hosting:
    """The parts of a node that hold blocks. Made by `start_hosting`, stopped by the node."""

    def __init__(self, host: Host, keeper: RoundKeeper, announcer: Announcer, exchange: HivemindExchange) -> None:
        self.host, self.keeper, self.announcer = host, keeper, announcer
        self._exchange = exchange

    async def stop(self) -> None:
        """Keep what was learnt, say that this peer is gone, end the compute thread."""
        try:
            await self.host.checkpoint()
        except BadCheckpoint as error:
            logger.error("%s", error)
        try:
            await self.announcer.announce(leaving=True)
        except NetworkFailed as error:
            logger.info("left without a word: %s", error)  # p2pd is gone; the record expires by itself
        finally:
            await self._exchange.stop()
            await asyncio.to_thread(self.host.close)


async def start_hosting(node: Node, config: HostingConfig) -> Hosting:
    """See Node.host."""
    spec = node.spec
    source = await asyncio.to_thread(find_run_model, node.spec, config.model, config.cache_dir)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, spec.model.compute_dtype, device)
    room, me = _affordable(source, dtype, config.quantize), node.network.peer_id
    now = node.network.dht_time()
    span = config.span or pick_span(node.router.records, source.num_blocks, room, me=me, now=now)
    if span.end > source.num_blocks:
        raise BadSpan(f"span {span} ends after the {source.num_blocks} blocks of {source.name}; use fewer")
    await asyncio.to_thread(check_weights, source, spec, span.blocks())
    logger.info("model found name=%s blocks=%s", source.name, span)
    averaging, rules = averaging_config(spec), unit_rules(spec)
    lora = lora_settings(spec, own_rank=config.lora_rank)
    layout = (await asyncio.to_thread(layout_digest, lora, source)).hex()
    host = await load_host(
        source,
        HostConfig(
            span=span,
            dtype=dtype,
            device=device,
            quantize=config.quantize,
            cache_bytes=config.cache_bytes,
            num_threads=config.num_threads,
        ),
        RunRules(
            run=node.config.run,
            layout=layout,
            lora=lora,
            optimizer=optimizer_config(spec),
            batch_size=spec.training.batch_size,
            units=rules,
        ),
        node.config.state,
    )
    exchange = HivemindExchange(node.network, node.network.identity, node.config.run, averaging)
    await exchange.start()
    around = Surroundings(
        directory=node.directory,
        pool=node.pool,
        dht_time=node.network.dht_time,
        router=node.router,
    )
    keeper = RoundKeeper(
        host,
        Averager(exchange, node.network.peer_id, layout, averaging, rules=rules, now=node.network.dht_time),
        around,
        KeeperConfig(whole=node.whole, averaging=averaging, link=Link(client_mode=node.network.config.client_mode)),
    )
    hosting = Hosting(host, keeper, Announcer(node, host, config), exchange)
    await keeper.catch_up()
    logger.info("caught up round=%d", host.round)
    await _serve(node, host, source)
    node.spawn(host.run(), "optimizer steps")
    node.spawn(keeper.run(), "rounds")
    logger.info("serving blocks=%s dtype=%s quantize=%s device=%s", span, dtype, config.quantize, device)
    return hosting


async def _serve(node: Node, host: Host, source: ModelSource) -> None:
    edge = Edge(hidden_size=source.hidden_size, max_positions=source.max_positions)
    decode = DecodeService(
        DecodeParts(
            span=host.span,
            caches=host.caches,
            thread=host.thread,
            shelf=host.shelf,
            drop_versions=host.drop_versions,
        ),
        edge,
        node.pool,
    )
    await node.serve(StreamKind.TRAIN, TrainService(host.trainer, host.shelf, edge, node.pool))
    await node.serve(StreamKind.DECODE, decode)
    await node.serve(StreamKind.UNITS, UnitsService(host))
    node.spawn(_sweep(decode), "session deadlines")


async def _sweep(decode: DecodeService) -> None:
    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        await decode.sweep()


def _affordable(source: ModelSource, dtype: torch.dtype, quantize: Quantization | None) -> int:
    """How many blocks fit in half of the free memory; at least one, at most all."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    per_weight = dtype.itemsize if quantize is None else BYTES_PER_WEIGHT[quantize]
    per_block = max(1, int(block_parameters(source) * per_weight))
    return max(1, min(source.num_blocks, int(free * _MEMORY_SHARE) // per_block))
