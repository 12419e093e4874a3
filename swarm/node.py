"""One running peer: builds, starts and stops every part. The only place where parts are wired together."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from blocks.spans import Span
from peers.config import NetworkConfig
from peers.dialling_back import DialBack
from peers.directory import Directory
from peers.errors import BadRecord, NetworkFailed
from peers.hivemind_network import HivemindNetwork
from peers.info_service import InfoService
from peers.private.membership import Role
from peers.private.role_guard import RoleGuard
from peers.published.service import SharedSource, SharedUnits
from peers.routes.own_router import OwnRouter
from peers.routes.router import LiveRouter, Router, RouterConfig
from peers.routes.routing import EVERYBODY, RouteRules
from peers.streams.answering import CallServer, Handler
from peers.streams.calls import hello_maker
from peers.streams.messages import StreamKind
from peers.streams.pool import Pool
from peers.streams.send_limit import SendLimit
from peers.streams.traffic import Traffic
from swarm.adapters.watch import CatalogueWatch
from swarm.config import RunSpec
from swarm.errors import BadConfig, BadJoinString, NotInvited
from swarm.private.entry import PrivateRun
from swarm.private.revoking import RevocationWatch
from swarm.reaching import start_reaching
from swarm.reports.metrics import MetricsLog, Value
from swarm.run import RunId, open_run, owner_of, save_run

if TYPE_CHECKING:
    from swarm.hosts.holding import Holding
    from swarm.hosts.hosting import Hosting
    from swarm.hosts.loading import HostingConfig
    from swarm.lan.discovery import LanPresence
    from swarm.own_loops.taking_part import OwnModel, TakingPart

logger = logging.getLogger(__name__)

BOOK_NAME = "peers.json"  # in the state directory: who was there, for the next start
RUN_LIFE_SECONDS = 600.0
_BOOK_SECONDS = 60.0
_METRICS_SECONDS = 10.0
_FIND_RUN_SECONDS = 10.0
_MAX_SKEW_SECONDS = 3.0  # hivemind's DHT drops records of a peer whose clock is further off


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeConfig:
    """Where one peer lives and whom it asks. `run_blob` is the owner's signed run; others find it in the swarm.

    `max_send` bounds what it sends, in bytes per second. `lan` is the group under which others on its network find it.
    `private` is how this peer gets into a private run.
    """

    run: RunId
    network: NetworkConfig
    state: Path
    run_blob: bytes | None = None
    rules: RouteRules = field(default=EVERYBODY)
    route_seconds: float = 300.0
    max_send: float = math.inf
    lan: str | None = None
    private: PrivateRun | None = None


class Node:
    """A peer of one run. `start`, use, `stop`; a failure of a background task shows in `wait`."""

    def __init__(self, config: NodeConfig, network: HivemindNetwork, spec: RunSpec, owner: bytes) -> None:
        self.config, self.network, self.spec = config, network, spec
        self.traffic = Traffic(limit=SendLimit(config.max_send, name=f"peer {network.peer_id}"))
        self.metrics = MetricsLog(config.state)
        self.directory: Directory = network.directory
        self.hello = hello_maker(config.run, software_name())
        self.pool = Pool(network, self.hello, self.traffic, {})
        self.router = LiveRouter(
            self.directory,
            self.pool,
            RouterConfig(run=config.run, whole=self.whole, rules=config.rules, wait_seconds=config.route_seconds),
            rng=random.Random(),
            check=self.check,
        )
        self.catalogue = CatalogueWatch(network.directory, owner, config.run, config.state, network.dht_time)
        self.taking_part: TakingPart | None = None
        self.farewells: list[Callable[[], Awaitable[None]]] = []
        """What else is to be said before this peer leaves; each takes its time, at most seconds, and does not fail."""
        self.revocations: RevocationWatch | None = None  # of a private run
        self._holding: Holding | None = None
        self._presence: LanPresence | None = None
        self._servers: dict[str, CallServer] = {}
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def start(cls, config: NodeConfig) -> Node:
        """Enter the swarm and learn what the run is.

        Raises:
            NetworkFailed, BadIdentity: the node cannot start; the message says what to do.
            BadJoinString: the peers that answered do not know this run.
            NotInvited: it is private.
        """
        network = await HivemindNetwork.start(
            config.network,
            run=config.run,
            identity_path=config.state / "identity",
            address_book=config.state / BOOK_NAME,
            members=None if config.private is None else config.private.members,
        )
        try:
            blob = config.run_blob or await _find_run(network.directory, config.run)
            node = cls(config, network, open_run(blob, config.run), owner_of(blob))
            _keep_run(config.state, blob)
            await _watch_revoked(node)
            info = InfoService(node.sealed_record, node.traffic, dial_back=DialBack(network.seen_at))
            await node.serve(StreamKind.INFO, info)
            await node.router.refresh()
            if config.lan is not None and not config.network.client_mode:
                node._presence = await _show_up(network, config, node.spec.name)
        except BaseException:
            await network.stop()
            raise
        logger.info("entered the swarm peer=%s", network.peer_id)
        node.spawn(node._watch_daemon(), "p2pd")
        node.spawn(node.router.run(), "router")
        node.spawn(_keep_known(node, blob), "address book and run record")
        node.spawn(_measure(node), "metrics")
        return node

    @property
    def whole(self) -> Span:
        """All blocks of the run's model."""
        return Span(0, self.spec.model.num_blocks)

    def routes(self) -> Router:
        """How this peer's own work is routed: through itself alone where it holds every block."""
        if self.hosting is not None and self.hosting.host.span == self.whole:
            return OwnRouter(self.network.peer_id)
        return self.router

    async def host(self, config: HostingConfig) -> Hosting:
        """Hold a span: load it, catch up with its other holders, serve it, take part in rounds. Where nobody chose the
        span by hand, this host moves to other blocks when the swarm lacks them more.

        Raises:
            BlockError: the model or the span does not fit.
            SwarmError: the state directory or the model belongs to something else; or this peer may not hold blocks.
            NetworkFailed: p2pd ended before the swarm could be told.
        """
        # Imported here: a peer without a model needs neither transformers nor peft (120 MB).
        from swarm.hosts.holding import Holding

        if self.hosting is not None:
            raise BadConfig(f"this peer holds blocks {self.hosting.host.span} already; start another peer for more")
        await _let_be_called(self, config.span)
        self._holding = Holding(self, config)
        return await self._holding.begin()

    async def take_part(self, own: OwnModel) -> TakingPart:
        """Hold all units as the trained tensors of a model that a loop of its own trains, and average them.

        Raises:
            BlockError, SwarmError, NetworkFailed: see start_taking_part.
        """
        from swarm.own_loops.taking_part import start_taking_part

        await _let_be_called(self, self.whole)
        self.taking_part = await start_taking_part(self, own)
        return self.taking_part

    @property
    def hosting(self) -> Hosting | None:
        """What is held now; None also while it is being loaded."""
        return None if self._holding is None else self._holding.hosting

    async def serve(self, kind: str, handler: Handler) -> None:
        """Answer streams of a kind, from other peers and from this one."""
        self.pool.add_local(kind, handler)
        if self.network.gate is not None:
            handler = RoleGuard(handler, self.network.gate)
        if kind in self._servers:  # p2pd takes one handler of a kind for good, so another one is put behind it
            self._servers[kind].handler = handler
            return
        self._servers[kind] = server = CallServer(self.hello, handler, self.traffic)
        await self.network.serve_stream(kind, server.serve)

    def spawn(self, work: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
        """Run a background task until the node stops, or `end` ends it; its failure ends `wait`."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.append(task)
        return task

    async def end(self, tasks: Collection[asyncio.Task[None]]) -> None:
        """End some background tasks."""
        self._tasks = [task for task in self._tasks if task not in tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def sealed_record(self) -> bytes:
        """This peer's own record as it was last announced; empty while it serves nothing, also while it loads."""
        if self.taking_part is not None:
            return self.taking_part.sealed
        return b"" if self._holding is None or self.hosting is None else self._holding.announcer.sealed

    def line(self) -> str:
        """How this peer stands, in one line."""
        hosts = f"{len(self.router.records)} hosts"
        if self.hosting is None:
            return hosts
        host = self.hosting.host
        samples = max((counted.samples for counted in host.counted().values()), default=0)
        line = f"blocks {host.span}, round {host.round}, {samples} samples since, {host.trainer.steps} steps, {hosts}"
        paused = self.hosting.pauser.words()
        return f"{paused}; {line}" if paused else line

    async def wait(self, seconds: float | None = None) -> None:
        """Until a background task fails, or `seconds` have passed; the task's error is raised here."""
        done, _ = await asyncio.wait(self._tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if not task.cancelled():
                task.result()

    async def stop(self) -> None:
        """Leave: say so, finish what is in flight, checkpoint, close streams, end p2pd; whichever of these fails."""
        try:
            for leave in (*self.farewells, *(part.leave for part in self.members())):
                await leave()
        finally:
            await self.end(self._tasks)
            async with AsyncExitStack() as stack:
                stack.push_async_callback(self.network.stop)
                stack.push_async_callback(self.pool.close)
                if self._presence is not None:
                    stack.push_async_callback(asyncio.to_thread, self._presence.close)
                for part in self.members():
                    await part.stop()

    def failure(self) -> BaseException | None:
        """What ended a background task, if one has ended by itself."""
        ended = [task for task in self._tasks if task.done() and not task.cancelled()]
        return next((task.exception() for task in ended), None)

    def check(self) -> None:
        """Raises what has ended a background task, such as the end of this peer's membership, if one has ended."""
        if (failure := self.failure()) is not None:
            raise failure

    def members(self) -> list[Hosting | TakingPart]:
        """What of this node comes to rounds."""
        return [part for part in (self.hosting, self.taking_part) if part is not None]

    async def _watch_daemon(self) -> None:
        """A node without its p2pd reaches nobody: say so instead of waiting for answers.

        Raises:
            NetworkFailed: p2pd ended.
        """
        words = await self.network.wait_dead()
        raise NetworkFailed(
            f"p2pd ended ({words or 'it said nothing'}); start this peer again, it goes on from its state"
        )


async def share(node: Node, source: SharedSource) -> None:
    """Let others fetch published adapters from `node`, which holds no blocks.

    Raises:
        NotInvited, NetworkFailed: see _let_be_called.
    """
    await _let_be_called(node, node.whole)
    await node.serve(StreamKind.UNITS, SharedUnits(source))


async def _let_be_called(node: Node, span: Span | None) -> None:
    """Whoever holds `span` is called by others: in a private run they call hosts alone, and who cannot be dialled keeps
    connections to them.

    Raises:
        NotInvited: this peer is no host of the private run.
        BadConfig, NetworkFailed: see start_reaching.
    """
    gate = node.network.gate
    if gate is not None and not gate.own.role.covers(Role.HOST):
        raise NotInvited(
            f"this peer was invited as a {gate.own.role}, and only hosts hold blocks or average;"
            " ask the run's owner for an invitation with --role host"
        )
    if node.network.config.client_mode:
        reaching = await start_reaching(node.network, lambda: node.router.found, span)
        node.spawn(reaching.run(), "connections")


async def _keep_known(node: Node, run_blob: bytes) -> None:
    """Store the run again before it expires, and remember who was there for the next start."""
    while True:
        gate = node.network.gate
        if gate is None or gate.own.role.covers(Role.TRAINER):  # clients of a private run may not store
            expires_at = node.network.dht_time() + RUN_LIFE_SECONDS
            await node.directory.store_run(node.config.run, run_blob, expires_at)
        found = [address for record in node.router.records for address in record.addresses[:2]]
        try:
            await node.network.remember(found)
        except NetworkFailed as error:
            logger.warning("%s", error)
        await asyncio.sleep(_BOOK_SECONDS)


async def _show_up(network: HivemindNetwork, config: NodeConfig, run_name: str) -> LanPresence | None:
    from swarm.lan.discovery import show_up

    assert config.lan is not None
    return await show_up(network, config.lan, config.run, run_name)


async def _watch_revoked(node: Node) -> None:
    """In a private run: take the owner's newest list before anything is done, and look for newer ones from then on.

    Raises:
        NotInvited: the run is private, and nothing here lets this peer in.
        BadMembership: the owner has put this peer out.
    """
    private, gate = node.config.private, node.network.gate
    if private is None or gate is None:
        if node.spec.security.private:
            raise NotInvited(
                f"run {node.spec.name} is private; send the id that `swarm id` prints to its owner, and join by the"
                " invitation that comes back"
            )
        return
    owner = private.members.owner
    node.revocations = RevocationWatch(node.network.directory, gate, owner, node.config.run, private.lists)
    await node.revocations.look()
    gate.check_own()
    node.spawn(node.revocations.run(), "those revoked")


async def _measure(node: Node) -> None:
    """Write how a peer stands, again and again."""
    while True:
        await asyncio.sleep(_METRICS_SECONDS)
        total = node.traffic.total
        numbers: dict[str, Value] = {"hosts": len(node.router.records), "sent": total.sent, "received": total.received}
        for holder in [part.holder for part in node.members()]:
            samples = max((counted.samples for counted in holder.counted().values()), default=0)
            numbers |= {"round": holder.round, "samples": samples, "total_samples": holder.total_samples()}
        await asyncio.to_thread(node.metrics.note, "peer", numbers)


def software_name() -> str:
    """What this peer says it runs."""
    return f"swarmtune {version('swarmtune')}"


def _keep_run(state: Path, blob: bytes) -> None:
    """The settings beside the checkpoints, so that the state directory can be used when the swarm is no more."""
    try:
        save_run(state, blob)
    except (BadConfig, BadRecord) as error:
        logger.warning("%s", error)


async def _find_run(directory: Directory, run: RunId) -> bytes:
    def is_valid(blob: bytes) -> bool:
        try:
            open_run(blob, run)
        except (BadConfig, BadRecord) as error:
            logger.debug("a copy of the run was refused: %s", error)
            return False
        return True

    deadline = time.monotonic() + _FIND_RUN_SECONDS
    while True:
        blob = await directory.find_run(run, is_valid)
        if blob is not None:
            return blob
        if time.monotonic() > deadline:
            raise BadJoinString(
                f"the peers that answered do not know run {run}; the join string may be of another or an ended run, "
                "ask its owner for a new one"
            )
        await asyncio.sleep(0.5)
