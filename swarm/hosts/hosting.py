"""A node that holds blocks: load the span, catch up, serve, announce, take part in rounds."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from averaging.averager import Averager, Link
from averaging.hivemind_exchange import HivemindExchange
from blocks.adapters import block_of, unit_digest
from blocks.source import ModelSource
from peers.chains.decode_service import DecodeParts, DecodeService
from peers.chains.edge import Edge
from peers.chains.train_service import TrainService
from peers.streams.messages import StreamKind
from peers.streams.work_gate import WorkGate
from peers.units.service import UnitsService
from swarm.adapters.files import DIRECTORY as PUBLISHED_DIRECTORY
from swarm.adapters.files import AdapterFiles
from swarm.errors import BadCheckpoint
from swarm.hosts.announcing import Announcer
from swarm.hosts.host import Host
from swarm.hosts.loading import HostingConfig, Load, load
from swarm.hosts.memory import AdapterRoom
from swarm.hosts.memory_now import free_bytes
from swarm.hosts.pause_file import PauseFile
from swarm.hosts.pausing import LEAVING, HostParts, Patience, Pauser, Switch, Withdrawal
from swarm.hosts.published import PublishedAdapters, PublishedParts
from swarm.hosts.published_shelf import PublishedShelf, ShelfParts
from swarm.run_rules import averaging_config
from swarm.units.company import Surroundings
from swarm.units.handing_over import HandingOver
from swarm.units.holder import Holder
from swarm.units.rounds import KeeperConfig, RoundKeeper
from swarm.units.safekeeping import Safekeeping

if TYPE_CHECKING:
    from swarm.node import Node

logger = logging.getLogger(__name__)

_SWEEP_SECONDS = 5.0
_FOLD_SECONDS = 10.0
_HAND_OVER_SECONDS = 10.0


class Hosting:
    """The parts of a node that hold blocks. Made by `start_hosting`, stopped by the node."""

    def __init__(
        self, parts: HostParts, announcer: Announcer, handing: HandingOver, exchange: HivemindExchange, pauser: Pauser
    ) -> None:
        self.host, self.keeper, self.announcer = parts.host, parts.keeper, announcer
        self.handing, self.pauser = handing, pauser
        self._exchange = exchange

    @property
    def holder(self) -> Host:
        """What is held."""
        return self.host

    async def leave(self, why: str = "leaving", patience: Patience = LEAVING) -> None:
        """Say that this peer goes, then finish what is in flight. Everything must be running still."""
        await self.pauser.withdrawal.leave(why, patience)

    async def stop(self) -> None:
        """Keep what was learnt, here and with keepers; end the compute thread."""
        self.pauser.close()
        try:
            await save_all(self.host, self.keeper, self.handing)
            await self.announcer.given.save()
        finally:
            await self._exchange.stop()
            await asyncio.to_thread(self.host.close)


async def save_all(host: Holder, keeper: RoundKeeper, handing: HandingOver) -> None:
    """Before a holder ends: its state to disk and to keepers. Of units of which it is the last live holder, with what
    was trained since their round, which would go with it.
    """

    async def fold() -> None:
        await keeper.company.check(host.span)
        folded = await host.fold(handing.sole_units())
        if folded:
            logger.info("saved what was trained since the last round units=%d", len(folded))

    await _in_time(fold(), _FOLD_SECONDS, "what was trained since the last round was not saved")
    try:
        await host.checkpoint()
    except BadCheckpoint as error:
        logger.error("%s", error)
    await _in_time(handing.tend(), _HAND_OVER_SECONDS, "not all units were handed to keepers")


async def start_hosting(
    node: Node, chosen: Load, config: HostingConfig, announcer: Announcer
) -> tuple[Hosting, list[asyncio.Task[None]]]:
    """Load what was chosen, catch up with its other holders, serve it; the last step is to tell the others. Returns the
    tasks that serve it, too.

    Raises:
        BlockError, SwarmError: it cannot be loaded.
        NetworkFailed: the others cannot be told.
    """
    async with AsyncExitStack() as undo:
        host = await load(node, chosen, config)
        undo.push_async_callback(asyncio.to_thread, host.close)
        network = node.network
        averaging, limit = averaging_config(node.spec), node.traffic.limit
        exchange = HivemindExchange(network, network.identity, node.config.run, averaging, limit)
        await exchange.start()
        undo.push_async_callback(exchange.stop)
        keeper = round_keeper(node, host, exchange)
        await keeper.catch_up(is_start=True)
        logger.info("caught up round=%d", host.round)
        published, shelf = _published(node, host, chosen, announcer)
        await published.begin()
        handing, safe = await serve_units(node, host, keeper, shelf)
        train, decode, sessions = await _serve(node, host, chosen.source, shelf)
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
        undo.callback(pauser.close)
        announcer.adapters = published.marks
        await announcer.arrived(host, lambda: sessions.served_tokens)
        undo.pop_all()
    works = {
        "optimizer steps": host.run(),
        "rounds": keeper.run(),
        "units for keepers": handing.run(),
        "room for others' units": safe.run(),
        "pauses": pauser.run(),
        "session deadlines": _sweep(sessions),
        "published adapters": published.run(),
    }
    tasks = [node.spawn(work, name) for name, work in works.items()]
    return Hosting(parts, announcer, handing, exchange, pauser), tasks


def round_keeper(node: Node, host: Holder, exchange: HivemindExchange) -> RoundKeeper:
    """Who keeps a holder in step with its run."""
    averaging, network = averaging_config(node.spec), node.network
    return RoundKeeper(
        host,
        Averager(exchange, network.peer_id, host.rules.layout, averaging, rules=host.rules.units, now=network.dht_time),
        Surroundings(
            directory=node.directory,
            pool=node.pool,
            dht_time=network.dht_time,
            router=node.router,
            behind_nat=network.config.client_mode,
        ),
        KeeperConfig(
            whole=node.whole,
            averaging=averaging,
            link=Link(
                megabits_per_second=node.traffic.limit.megabits_per_second, client_mode=network.config.client_mode
            ),
            checkpoint_rounds=node.spec.rounds.checkpoint_rounds,
            note=node.metrics.note,
        ),
    )


async def serve_units(
    node: Node, host: Holder, keeper: RoundKeeper, shelf: PublishedShelf | None = None
) -> tuple[HandingOver, Safekeeping]:
    """Answer those who fetch units, also of published adapters, or give them to keep; returns both sides of keeping."""
    company = keeper.company
    safe = Safekeeping(
        host,
        node.network.peer_id,
        company.others,
        known=company.known,
        averaging=averaging_config(node.spec),
    )
    await node.serve(StreamKind.UNITS, UnitsService(host, safe, unit_digest, shelf))
    return HandingOver(host, node.pool, company.others), safe


def _published(node: Node, host: Host, chosen: Load, announcer: Announcer) -> tuple[PublishedAdapters, PublishedShelf]:
    """The adapters that are served beside the trained one, and who keeps them as the run's owner wants it."""
    rules = host.rules
    blocks = sorted(block_of(unit) for unit in rules.shapes)
    files = AdapterFiles(node.config.state / PUBLISHED_DIRECTORY, rules.run, rules.layout, blocks)
    shelf = PublishedShelf(ShelfParts(host.model, host.thread, rules.lora.name, files))
    parts = PublishedParts(
        watch=node.catalogue,
        shelf=shelf,
        files=files,
        span=host.span,
        shapes=rules.shapes,
        adapter=rules.lora.name,
        room=AdapterRoom(chosen.room.adapter_bytes, free_bytes),
        spare_bytes=host.config.keep_bytes,
        pool=node.pool,
        records=lambda: node.router.found,
        announce=announcer.announce,
    )
    return PublishedAdapters(parts), shelf


async def _serve(
    node: Node, host: Host, source: ModelSource, shelf: PublishedShelf
) -> tuple[WorkGate, WorkGate, DecodeService]:
    """Answer others; returns the gates before training and texts, and the sessions of texts."""
    edge = Edge(hidden_size=source.hidden_size, max_positions=source.max_positions)
    decode = DecodeService(
        DecodeParts(
            span=host.span,
            caches=host.caches,
            thread=host.thread,
            shelf=host.shelf,
            drop_versions=host.drop_versions,
            published=shelf.label,
        ),
        edge,
        node.pool,
    )
    shelf.end_version = decode.end_version
    train = TrainService(host.trainer, host.shelf, edge, node.pool, host.drop_versions)
    gates = [WorkGate(service, node.network.peer_id, node.traffic.limit) for service in (train, decode)]
    await node.serve(StreamKind.TRAIN, gates[0])
    await node.serve(StreamKind.DECODE, gates[1])
    return gates[0], gates[1], decode


async def _sweep(decode: DecodeService) -> None:
    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        await decode.sweep()


async def _in_time(work: Coroutine[object, object, None], seconds: float, otherwise: str) -> None:
    """Leaving must not wait for others for ever."""
    try:
        async with asyncio.timeout(seconds):
            await work
    except TimeoutError:
        logger.warning("%s: it took longer than %.0f s", otherwise, seconds)
