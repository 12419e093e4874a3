"""How a node becomes part of a swarm: dial the bootstrap peers until one answers, then fill the routing table.

hivemind's own bootstrap tries once and gives up; two peers that start at the same moment and name each other need more.
"""

from __future__ import annotations

import asyncio
import logging

from hivemind.dht.node import DHTNode
from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure, P2PDaemonError, P2PHandlerError
from hivemind.proto import dht_pb2
from hivemind.utils.timed_storage import get_dht_time

from peers.errors import DIAL_BACKOFF, NOT_ADMITTED, NetworkFailed
from peers.hivemind_daemon import DIALLING, Daemon, DaemonOptions, one_line

logger = logging.getLogger(__name__)

MAX_CLOCK_SKEW_SECONDS = 3.0  # hivemind's own bound between DHT nodes
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.2, 3.0
_PING_SECONDS = 5.0
_RETRY_SECONDS = 0.05
_SEARCH_SECONDS = 3.0
_NOTHING_YET = "no answer"
_STRAGGLER_SECONDS = 0.5  # once one has answered, the others may take this much longer


class _WillNotDo(NetworkFailed):
    """This peer answered, but trying it again would change nothing. Another one may do."""


class _ClockDiffers(_WillNotDo):
    """Whose of the two clocks is wrong cannot be told from one answer."""


class _NotLetIn(_WillNotDo):
    """The run is private, and this peer was told that it is no member."""


async def join_swarm(p2p: Daemon, node: DHTNode, peers: tuple[str, ...], *, seconds: float, must: bool) -> None:
    """Dial `peers` until at least one is in the routing table. Without `must` one try is enough, and may fail.

    Raises:
        NetworkFailed: none answered within `seconds` (and `must`), or this machine's clock is off: nobody who answered
            has the same time.
    """
    if not peers:
        return
    wait_seconds, reasons, reached = _FIRST_WAIT_SECONDS, dict.fromkeys(peers, _NOTHING_YET), False
    try:
        async with asyncio.timeout(seconds):
            while True:
                reached = await _greet_all(p2p, node, reasons)
                if reached or not must:
                    break
                await asyncio.sleep(wait_seconds)
                wait_seconds = min(2 * wait_seconds, _LONGEST_WAIT_SECONDS)
    except TimeoutError:
        logger.debug("bootstrap gave up after %s s", seconds)
    if reached:
        await _fill_routing_table(node)
        return
    failures = "; ".join(f"{address}: {reason}" for address, reason in reasons.items())
    if must:
        raise NetworkFailed(
            f"no bootstrap peer answered in {seconds:.0f} s ({failures[:800]}); "
            "check that one of them runs and can be dialled from here, or use a newer join string"
        )
    logger.warning("no known peer answered; starting alone reason=%s", failures[:800])


async def is_taken_elsewhere(peer: str, bootstrap: tuple[str, ...], seconds: float) -> bool:
    """Whether somebody in the swarm of `bootstrap` answers under the id `peer`; asked by a nameless short-lived peer.

    Must run before this peer's own daemon listens, or it would find itself.
    """
    probe = await Daemon.launch(DaemonOptions(listen=(), dht_client=True))
    try:
        async with asyncio.timeout(seconds):
            reached = False
            for address in bootstrap:
                where, _, who = address.rpartition("/p2p/")
                try:
                    await probe.connect(who, (where,))
                    reached = True
                except (P2PDaemonError, OSError, asyncio.IncompleteReadError) as error:
                    logger.debug("identity probe: no answer address=%s reason=%s", address, error)
            return reached and await _can_find(probe, peer)
    except TimeoutError:
        return False
    finally:
        await probe.shutdown()


async def _can_find(probe: Daemon, peer: str) -> bool:
    """Whether the swarm that `probe` is connected to leads to `peer`."""
    while True:
        try:
            await probe.connect(peer, ())
        except ControlFailure as error:
            if "any peer in table" not in str(error):
                return False
            await asyncio.sleep(_RETRY_SECONDS)  # the daemons are still telling each other what they speak
        else:
            return True


async def _greet_all(p2p: Daemon, node: DHTNode, reasons: dict[str, str]) -> bool:
    """Greet every address of `reasons` at once and note why it failed; soon done once one has answered.

    Raises:
        NetworkFailed: those who answered all have another time than this machine, or do not let it in.
    """
    tasks = {asyncio.create_task(_greet(p2p, node, address)): address for address in reasons}
    pending = set(tasks)
    reached, useless = False, list[_WillNotDo]()
    try:
        while pending:
            done, pending = await asyncio.wait(
                pending, timeout=_STRAGGLER_SECONDS if reached else None, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                break
            for task in done:
                if isinstance(error := task.exception(), _WillNotDo):
                    useless.append(error)
                    reasons[tasks[task]] = str(error)
                    continue
                if DIAL_BACKOFF not in task.result() or reasons[tasks[task]] == _NOTHING_YET:
                    reasons[tasks[task]] = DIALLING.sub("", task.result())
                reached = reached or not task.result()
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
    if useless and not reached:
        raise useless[0]
    for error in useless:
        logger.warning("a known peer is of no use: %s", error)
    return reached


async def _greet(p2p: Daemon, node: DHTNode, address: str) -> str:
    """Connect to one peer and exchange DHT ids. Returns why it did not work, or the empty string.

    Raises:
        _ClockDiffers: by more than the DHT allows.
        _NotLetIn: it says so.
    """
    where, _, peer = address.rpartition("/p2p/")
    try:
        async with asyncio.timeout(_PING_SECONDS):
            await p2p.connect(peer, (where,))
            request = dht_pb2.PingRequest(peer=node.protocol.node_info, validate=True)
            sent_at = get_dht_time()
            response = await node.protocol.get_stub(PeerID.from_base58(peer)).rpc_ping(request)
            received_at = get_dht_time()
            if await node.protocol.call_ping(PeerID.from_base58(peer)) is None:
                return "it does not answer DHT requests yet"
    except TimeoutError:
        return f"no answer in {_PING_SECONDS:.0f} s"
    except (P2PDaemonError, P2PHandlerError, OSError, asyncio.IncompleteReadError, ValueError) as error:
        if isinstance(error, P2PHandlerError) and str(error).startswith(NOT_ADMITTED):
            raise _NotLetIn(f"peer {peer} says: {one_line(error).removeprefix(NOT_ADMITTED)}") from error
        return one_line(error)
    skew_seconds = max(sent_at - response.dht_time, response.dht_time - received_at, 0.0)
    if skew_seconds > MAX_CLOCK_SKEW_SECONDS:
        raise _ClockDiffers(
            f"this machine's clock differs from that of peer {peer} by {skew_seconds:.0f} s; "
            "set both by network time (for example: timedatectl set-ntp true)"
        )
    if not response.available and not node.protocol.client_mode:
        logger.warning("peer %s cannot dial back; open the port, set network.announce, or use client mode", peer)
    return ""


async def _fill_routing_table(node: DHTNode) -> None:
    """Look for this node's own neighbours: finds the others, and makes them know this node."""
    try:
        async with asyncio.timeout(_SEARCH_SECONDS):
            await node.find_nearest_nodes([node.node_id])
    except TimeoutError:
        logger.debug("the first search of the DHT was cut short")
