"""A node that holds blocks: choose and load the span, catch up, serve, announce, take part in rounds."""

from __future__ import annotations

import asyncio
import logging
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
from peers.messages import PROTOCOL_MAX, PROTOCOL_MIN, StreamKind
from peers.placement import pick_span
from peers.records import MAX_ADDRESSES, PeerRecord, seal_record
from peers.train_service import TrainService
from peers.units_service import UnitsService
from peers.work_gate import WorkGate
from swarm.devices import pick_device, pick_dtype
from swarm.errors import BadCheckpoint
from swarm.host import Host, HostConfig, RunRules, load_host
from swarm.hours import Hours
from swarm.memory import Allowance, Room, affordable, free_bytes, taken_bytes
from swarm.pause_file import PauseFile
from swarm.pausing import HostParts, Pauser, Switch, Withdrawal
from swarm.rounds import KeeperConfig, RoundKeeper, Surroundings
from swarm.run_model import check_weights, find_run_model
from swarm.run_rules import averaging_config, lora_settings, optimizer_config, unit_rules

if TYPE_CHECKING:
    from swarm.node import Node

logger = logging.getLogger(__name__)

RECORD_LIFE_SECONDS = 60.0
_SWEEP_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class HostingConfig:
    """What a person says about one host. `span` None: the span that the swarm lacks most, as long as memory allows.

    `model` is a local copy of the run's model; it must be the same one. `dtype` auto is the run's, and so is a
    `lora_rank` of 0. `max_memory_bytes` bounds this process with its weights, caches and work (on a GPU, what it takes
    there); `hours` are those of the day in which it takes part. None: no bound.
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
    max_memory_bytes: int | None = None
    hours: Hours | None = None


class Announcer:
    """Keeps this peer's record in the directory: at once on change, and before it expires."""

    def __init__(self, node: Node, host: Host, config: HostingConfig) -> None:
        self._node, self._host, self._config = node, host, config
        self.sealed = b""
        self.away = ""
        """Why this peer is no host now, one of peers.records.AWAY."""

    async def run(self) -> None:
        """Announce again until cancelled; the first time was before."""
        while True:
            said = self._host.round
            for _ in range(int(RECORD_LIFE_SECONDS / 2)):
                await asyncio.sleep(1.0)
                if self._host.round != said:
                    break
            await self.announce()

    async def announce(self) -> None:
        """Publish the record as of now."""
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
            roles=() if self.away else ("host",),
            away=self.away,
            expires_at=node.network.dht_time() + RECORD_LIFE_SECONDS,
        )
        self.sealed = seal_record(node.network.identity, record)
        await node.directory.publish(record)


class Hosting:
    """The parts of a node that hold blocks. Made by `start_hosting`, stopped by the node."""

    def __init__(
        self, host: Host, keeper: RoundKeeper, announcer: Announcer, exchange: HivemindExchange, pauser: Pauser
    ) -> None:
        self.host, self.keeper, self.announcer, self.pauser = host, keeper, announcer, pauser
        self._exchange = exchange

    async def leave(self) -> None:
        """Say that this peer goes, then finish what is in flight. Everything must be running still."""
        await self.pauser.withdrawal.leave()

    async def stop(self) -> None:
        """Keep what was learnt, end the compute thread."""
        self.pauser.close()
        try:
            await self.host.checkpoint()
        except BadCheckpoint as error:
            logger.error("%s", error)
        finally:
            await self._exchange.stop()
            await asyncio.to_thread(self.host.close)


async def start_hosting(node: Node, config: HostingConfig) -> Hosting:
    """See Node.host."""
    source = await asyncio.to_thread(find_run_model, node.spec, config.model, config.cache_dir)
    host = await _load(node, source, config)
    averaging, network = averaging_config(node.spec), node.network
    exchange = HivemindExchange(network, network.identity, node.config.run, averaging)
    await exchange.start()
    around = Surroundings(
        directory=node.directory,
        pool=node.pool,
        dht_time=network.dht_time,
        router=node.router,
    )
    link = Link(megabits_per_second=node.traffic.limit.megabits_per_second, client_mode=network.config.client_mode)
    keeper = RoundKeeper(
        host,
        Averager(exchange, network.peer_id, host.rules.layout, averaging, rules=host.rules.units, now=network.dht_time),
        around,
        KeeperConfig(whole=node.whole, averaging=averaging, link=link),
    )
    announcer = Announcer(node, host, config)
    await keeper.catch_up()
    logger.info("caught up round=%d", host.round)
    train, decode, sessions = await _serve(node, host, source)
    parts = HostParts(
        me=network.peer_id,
        host=host,
        keeper=keeper,
        announcer=announcer,
        train=train,
        decode=decode,
        sessions=sessions,
    )
    state = node.config.state
    pauser = Pauser(Withdrawal(parts), Switch(file=PauseFile(state), hours=config.hours), state)
    await pauser.begin()
    node.spawn(host.run(), "optimizer steps")
    node.spawn(keeper.run(), "rounds")
    node.spawn(pauser.run(), "pauses")
    return Hosting(host, keeper, announcer, exchange, pauser)


async def _load(node: Node, source: ModelSource, config: HostingConfig) -> Host:
    spec = node.spec
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, spec.model.compute_dtype, device)
    span, room = _choose(node, source, config, (device, dtype))
    await asyncio.to_thread(check_weights, source, spec, span.blocks())
    logger.info("model found name=%s blocks=%s", source.name, span)
    lora = lora_settings(spec, own_rank=config.lora_rank)
    layout = (await asyncio.to_thread(layout_digest, lora, source)).hex()
    host = await load_host(
        source,
        HostConfig(
            span=span,
            dtype=dtype,
            device=device,
            quantize=config.quantize,
            cache_bytes=room.cache_bytes,
            num_threads=config.num_threads,
            limits=room.limits,
        ),
        RunRules(
            run=node.config.run,
            layout=layout,
            lora=lora,
            optimizer=optimizer_config(spec),
            batch_size=spec.training.batch_size,
            units=unit_rules(spec),
        ),
        node.config.state,
    )
    logger.info("loaded blocks=%s dtype=%s quantize=%s device=%s", span, dtype, config.quantize, device)
    return host


async def _serve(node: Node, host: Host, source: ModelSource) -> tuple[WorkGate, WorkGate, DecodeService]:
    """Answer others; returns the gates before training and texts, and the sessions of texts."""
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
    train = TrainService(host.trainer, host.shelf, edge, node.pool)
    gates = [WorkGate(service, node.network.peer_id, node.traffic.limit) for service in (train, decode)]
    await node.serve(StreamKind.TRAIN, gates[0])
    await node.serve(StreamKind.DECODE, gates[1])
    await node.serve(StreamKind.UNITS, UnitsService(host))
    node.spawn(_sweep(decode), "session deadlines")
    return gates[0], gates[1], decode


async def _sweep(decode: DecodeService) -> None:
    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        await decode.sweep()


def _choose(
    node: Node, source: ModelSource, config: HostingConfig, computing: tuple[torch.device, torch.dtype]
) -> tuple[Span, Room]:
    """Which blocks to hold, and the memory beside them.

    Raises:
        BadSpan: the model has not so many blocks.
        BadConfig: what a person allows has no room for the blocks.
    """
    device, dtype = computing
    block_bytes = int(
        block_parameters(source) * (BYTES_PER_WEIGHT[config.quantize] if config.quantize else dtype.itemsize)
    )
    most = affordable(free_bytes(), block_bytes, source.num_blocks)
    allowance = None
    if config.max_memory_bytes is not None:
        taken = taken_bytes() if device.type == "cpu" else 0
        allowance = Allowance(most_bytes=config.max_memory_bytes, taken_bytes=taken, block_bytes=block_bytes)
        most = min(most, allowance.most_blocks())
    span = config.span or pick_span(node.router.records, source.num_blocks, most, me=node.network.peer_id)
    if span.end > source.num_blocks:
        raise BadSpan(f"span {span} ends after the {source.num_blocks} blocks of {source.name}; use fewer")
    room = Room(cache_bytes=config.cache_bytes)
    return span, room if allowance is None else allowance.room(len(span), room)
