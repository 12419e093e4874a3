"""The network node of a peer: one p2pd, one DHT node, streams of bytes between peers whose identity is known."""

from __future__ import annotations

import asyncio
import errno
import logging
import re
import socket
from collections import Counter
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hivemind.dht.node import DHTNode
from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError
from hivemind.utils.timed_storage import get_dht_time

from peers.address_book import load_addresses, save_addresses
from peers.config import NetworkConfig
from peers.errors import BadIdentity, NetworkFailed, PeerError
from peers.hivemind_bootstrap import is_taken_elsewhere, join_swarm
from peers.hivemind_daemon import DIALLING, Daemon, one_line, options_of
from peers.hivemind_directory import HivemindDirectory, SealValidator
from peers.hivemind_lan import group_protocol
from peers.hivemind_members import Members, refuse
from peers.identity import Identity, IdentityLock, hold, load_or_create
from peers.network import ByteStream, PeerId, StreamHandler
from peers.private.gate import Gate, MemberConfig
from peers.private.membership import Role
from peers.records import SealCache

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_IDENTITY_PROBE_SECONDS = 5.0
_LEAVE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class _Hints:
    """What a starting node has: addresses from before, whether its identity is new, its place in a private run."""

    known: tuple[str, ...]
    fresh: bool
    members: MemberConfig | None


class HivemindNetwork:
    """A running node; implements `network.Network`. Made by `start`, ended by `stop`."""

    def __init__(
        self, config: NetworkConfig, run: str, identity: Identity, p2p: Daemon, directory: HivemindDirectory
    ) -> None:
        self.config, self.identity, self.p2p, self.directory = config, identity, p2p, directory
        self.dht_node = directory.node
        self._run = run
        self._handlers: set[asyncio.Task[Any]] = set()
        self._streams: Counter[PeerId] = Counter()
        self._lock: IdentityLock | None = None
        self._address_book: Path | None = None
        self._stopping = False
        self._members: Members | None = None

    @classmethod
    async def start(
        cls,
        config: NetworkConfig,
        *,
        run: str,
        identity_path: Path,
        address_book: Path | None = None,
        members: MemberConfig | None = None,
    ) -> HivemindNetwork:
        """Start a node and join the swarm of `config.bootstrap`, or of peers that `address_book` knows from before.

        With `members` the run is private: nobody else is called or answered.

        Raises:
            BadIdentity: the identity file is unusable, or in use here or elsewhere in the swarm.
            BadMembership: `members` does not make this peer a member.
            NetworkFailed: the port is taken, p2pd did not start, or no bootstrap peer answered in time, or none lets
                this peer in.
        """
        if _NAME.fullmatch(run) is None:
            raise NetworkFailed(f"'{run[:80]}' cannot name a run's streams; use 1 to 64 letters, digits, '_', '-', '.'")
        fresh = not await asyncio.to_thread(identity_path.exists)
        identity = await asyncio.to_thread(load_or_create, identity_path)
        known = await asyncio.to_thread(load_addresses, address_book) if address_book is not None else ()
        lock = hold(identity_path)
        try:
            network = await _start_held(config, run, identity_path, identity, _Hints(known, fresh, members))
        except BaseException:
            lock.release()
            raise
        network._lock, network._address_book = lock, address_book
        return network

    @property
    def peer_id(self) -> PeerId:
        """Who this node is."""
        return self.identity.peer

    @property
    def gate(self) -> Gate | None:
        """Who may pass here, in a private run."""
        return self.p2p.gate

    def dht_time(self) -> float:
        """The clock that records and rounds are dated by: seconds since 1970, as the peers agree on it within 3 s."""
        return float(get_dht_time())

    async def addresses(self) -> tuple[str, ...]:
        """Where others can dial this node now, each ending in /p2p/PEER; empty in client mode.

        Raises:
            NetworkFailed: p2pd is gone.
        """
        if self.config.client_mode:
            return ()
        visible = await _asked(self.peer_id, self.p2p.get_visible_maddrs(latest=True))
        return tuple(str(address) for address in visible)

    async def remember(self, addresses: Iterable[str]) -> None:
        """Put addresses of other peers (from their records) into the address book, for the next start.

        Raises:
            NetworkFailed: the book cannot be written.
        """
        if self._address_book is not None:
            others = [address for address in addresses if not address.endswith(f"/p2p/{self.peer_id}")]
            await asyncio.to_thread(save_addresses, self._address_book, others)

    async def connect(self, peer: PeerId, addresses: tuple[str, ...]) -> None:
        """Make a connection to `peer`, at the addresses of its record.

        Raises:
            NetworkFailed: no address answered in time, or not under that id.
        """
        where = tuple(address.removesuffix(f"/p2p/{peer}") for address in addresses)
        try:
            async with asyncio.timeout(self.config.dial_seconds):
                await self.p2p.connect(peer, where)
        except (P2PDaemonError, OSError, asyncio.IncompleteReadError, ValueError, TimeoutError) as error:
            raise NetworkFailed(
                f"peer {peer} cannot be reached at {', '.join(where)[:300]}: {one_line(error)}"
            ) from error

    async def connected(self) -> frozenset[PeerId]:
        """To whom there is a connection now, whoever made it.

        Raises:
            NetworkFailed: p2pd is gone.
        """
        found = await _asked(self.peer_id, self.p2p.list_peers())
        return frozenset(PeerId(each.peer_id.to_base58()) for each in found)

    async def seen_at(self, peer: PeerId) -> tuple[str, ...]:
        """The multiaddrs at the other end of the connections to `peer`. Raises NetworkFailed if p2pd is gone."""
        found = await _asked(self.peer_id, self.p2p.list_peers())
        return tuple(str(address) for each in found if each.peer_id.to_base58() == peer for address in each.addrs)

    async def open_stream(self, peer: PeerId, kind: str) -> ByteStream:
        """Dial `peer` and open a stream of `kind`. The caller keeps the writer (asyncio closes lost ones).

        Raises:
            NetworkFailed: the peer cannot be reached in time, or does not serve that kind.
        """
        try:
            async with asyncio.timeout(self.config.dial_seconds):
                reader, writer = await self.p2p.open_raw(peer, self._protocol(kind))
        except TimeoutError as error:
            raise NetworkFailed(f"peer {peer} did not answer in {self.config.dial_seconds:.0f} s") from error
        except (P2PDaemonError, OSError, asyncio.IncompleteReadError, ValueError) as error:
            why = DIALLING.sub(lambda found: f"{found[1] or 'dialling'}: ", one_line(error))
            raise NetworkFailed(f"no '{kind}' stream to peer {peer}: {why}") from error
        return ByteStream(peer=peer, reader=reader, writer=writer)

    async def serve_stream(self, kind: str, handler: StreamHandler) -> None:
        """Call `handler` with each incoming stream of `kind`; the stream closes when the handler returns."""
        await self.p2p.serve_raw(self._protocol(kind), partial(self._handle, kind, handler), refuse)

    async def tell_group(self, group: str, answer: bytes) -> None:
        """Tell whoever asks for the group, a stranger too, what it is; see hivemind_lan.ask_group."""

        async def tell(stream: ByteStream) -> None:
            stream.writer.write(answer)
            async with asyncio.timeout(self.config.dial_seconds):
                await stream.writer.drain()

        await self.p2p.serve_raw(group_protocol(group), partial(self._handle, "group", tell), None)

    async def wait_dead(self) -> str:
        """Wait until p2pd ends, for whatever reason, and return its last words; then nothing here works any more."""
        return await self.p2p.wait_dead()

    async def stop(self) -> None:
        """Close all streams, leave the DHT, end p2pd, let go of the identity. Doing so twice is harmless."""
        if self._stopping:
            return
        self._stopping = True
        tasks = list(self._handlers)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._members is not None:
            await self._members.stop()
        try:
            async with asyncio.timeout(_LEAVE_SECONDS):  # a p2pd that is gone answers nothing
                await self.dht_node.shutdown()
        except (TimeoutError, P2PDaemonError, OSError) as error:
            logger.debug("the DHT node did not leave in order reason=%r", error)
        await self.p2p.shutdown()
        if self._lock is not None:
            self._lock.release()
        logger.info("node stopped peer=%s", self.peer_id)

    def _protocol(self, kind: str) -> str:
        return f"swarmtune/{self._run}/{kind}"

    async def _handle(
        self, kind: str, handler: StreamHandler, info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        remote: PeerID = info.peer_id
        peer, task = PeerId(remote.to_base58()), asyncio.current_task()
        full = self._streams.total() >= self.config.max_streams
        if task is None or full or self._streams[peer] >= self.config.max_streams_per_peer:
            logger.warning("stream refused peer=%s kind=%s reason=too many streams", peer, kind)
            writer.close()
            return
        self._handlers.add(task)
        self._streams[peer] += 1
        try:
            await handler(ByteStream(peer=peer, reader=reader, writer=writer))
        except asyncio.CancelledError:
            if not self._stopping:
                raise
        except (PeerError, OSError, asyncio.IncompleteReadError) as error:
            logger.debug("stream ended peer=%s kind=%s reason=%s", peer, kind, error)
        except Exception:  # the outer edge of a task that nobody awaits
            logger.exception("stream handler failed peer=%s kind=%s", peer, kind)
        finally:
            self._handlers.discard(task)
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]
            writer.close()


async def _asked(me: PeerId, question: Awaitable[Any]) -> Any:
    """What this node's own p2pd says."""
    try:
        return await question
    except (P2PDaemonError, OSError, asyncio.IncompleteReadError) as error:
        raise NetworkFailed(
            f"p2pd of peer {me} does not answer ({one_line(error)}); start this peer again, it goes on from its state"
        ) from error


async def _start_held(
    config: NetworkConfig,
    run: str,
    identity_path: Path,
    identity: Identity,
    hints: _Hints,
) -> HivemindNetwork:
    all_known = dict.fromkeys(config.bootstrap + hints.known)
    peers = tuple(address for address in all_known if not address.endswith(f"/p2p/{identity.peer}"))
    _check_port_is_free(config)
    asked = peers or config.bootstrap  # all of them are this peer itself: somebody may be answering in its name
    if asked and not hints.fresh and await is_taken_elsewhere(identity.peer, asked, _IDENTITY_PROBE_SECONDS):
        raise BadIdentity(
            f"identity {identity_path} ({identity.peer}) is in use by another peer of this swarm; "
            "stop that one or give this peer another --state"
        )
    p2p = await Daemon.launch(options_of(config, identity_path, peers))
    cache, members = SealCache(), None
    try:
        if hints.members is not None:
            members = Members(p2p, hints.members, run, identity.peer)
            await members.start()
        gate = None if members is None else members.gate
        # Clients of a private run may not store, so theirs does not try to keep others' caches fresh either.
        cached = 1 if gate is None or gate.own.role.covers(Role.TRAINER) else 0
        validator = SealValidator(cache, gate)
        dht_node = await DHTNode.create(
            p2p=p2p, client_mode=config.client_mode, record_validator=validator, cache_nearest=cached
        )
        await join_swarm(p2p, dht_node, peers, seconds=config.start_seconds, must=bool(config.bootstrap))
    except BaseException:
        if members is not None:
            await members.stop()
        await p2p.shutdown()
        raise
    logger.info("node started peer=%s run=%s", identity.peer, run)
    network = HivemindNetwork(config, run, identity, p2p, HivemindDirectory(dht_node, identity, cache))
    network._members = members
    return network


def _check_port_is_free(config: NetworkConfig) -> None:
    """libp2p shares ports with other listeners of the same user (SO_REUSEPORT), so p2pd alone might not notice."""
    if config.client_mode:
        return
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((config.host, config.port))
            probe.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise NetworkFailed(
                f"{config.host} is no address of this machine; give its own as --host, or 0.0.0.0 for all"
            ) from error
        raise NetworkFailed(
            f"port {config.port} on {config.host} cannot be used ({error.strerror}); "
            "stop what uses it, or choose another --port (0 takes any)"
        ) from error
