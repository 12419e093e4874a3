"""Finds peers on the local network by mDNS, and says there that this one is here (zeroconf; nothing else leaves it)."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peers.hivemind_lan import ask_group
from swarm.join_string import Join
from swarm.lan.records import (
    MOST_PEERS,
    SERVICE,
    BadLan,
    LanPeer,
    choose_join,
    fitting_addresses,
    format_answer,
    parse_answer,
    parse_peers_file,
    parse_texts,
)

if TYPE_CHECKING:
    from zeroconf import Zeroconf

    from peers.hivemind_network import HivemindNetwork
    from swarm.run import RunId

logger = logging.getLogger(__name__)

SEARCH_SECONDS = 4.0
# After an answer that nobody gave before. Who spoke less than a second ago speaks a second later (RFC 6762, section 6),
# and two runs of one name must both be seen: else the first to answer would be joined by chance.
_SETTLE_SECONDS = 2.0
_MOST_SETTLING = 3  # times
_ASK_MILLISECONDS = 1500
_ASK_SECONDS = 8.0
_MOST_FILE_BYTES = 256 * 1024
ANY_HOST = ("0.0.0.0", "::")


class LanPresence:
    """Says by mDNS that a peer is here, until `close`. Both ends take about a second: call them in a thread."""

    def __init__(self, peer: LanPeer, *, host: str) -> None:
        """`host` is the address that the peer listens on: its network is told, all of them for 0.0.0.0.

        Raises:
            BadLan: this machine has no network that takes multicast.
        """
        from zeroconf import ServiceInfo

        who = peer.addresses[0].rpartition("/p2p/")[2]
        label = f"{peer.group}-{who[-12:]}"
        self._zeroconf = _open(host)
        self._info = ServiceInfo(
            SERVICE,
            f"{label}.{SERVICE}",
            port=_port(peer.addresses[0]),
            properties=peer.to_texts(),
            server=f"{label}.local.",
            parsed_addresses=[_address(peer.addresses[0])],
        )
        try:
            self._zeroconf.register_service(self._info, cooperating_responders=True)
        except OSError as error:
            self._zeroconf.close()
            raise _blocked(error) from None

    def close(self) -> None:
        """Say goodbye."""
        try:
            self._zeroconf.unregister_service(self._info)
        except OSError as error:
            logger.debug("mDNS goodbye not said: %s", error)
        self._zeroconf.close()


def search(group: str, *, host: str = ANY_HOST[0], seconds: float = SEARCH_SECONDS) -> list[LanPeer]:
    """Peers of a group that answer within `seconds`; returns when nobody new has answered for a while.

    Raises:
        BadLan: this machine has no network that takes multicast.
    """
    from zeroconf import ServiceBrowser

    found: dict[str, LanPeer] = {}
    answered = threading.Event()

    class Listener:
        def add_service(self, zeroconf: Zeroconf, kind: str, name: str) -> None:
            if len(found) >= MOST_PEERS or not name.startswith(f"{group}-"):
                return
            info = zeroconf.get_service_info(kind, name, timeout=_ASK_MILLISECONDS)
            if info is None:
                return
            try:
                peer = parse_texts(info.properties)
            except BadLan as error:
                logger.debug("left out %r: %s", name[:80], error)
                return
            if name not in found:
                answered.set()
            found[name] = peer

        def update_service(self, zeroconf: Zeroconf, kind: str, name: str) -> None:
            self.add_service(zeroconf, kind, name)

        def remove_service(self, zeroconf: Zeroconf, kind: str, name: str) -> None:
            found.pop(name, None)

    zeroconf = _open(host)
    try:
        browser = ServiceBrowser(zeroconf, SERVICE, listener=Listener())  # type: ignore[arg-type]
        wait_seconds = seconds
        for _ in range(1 + _MOST_SETTLING):
            if not answered.wait(wait_seconds):
                break
            answered.clear()
            wait_seconds = _SETTLE_SECONDS
        browser.cancel()
    finally:
        zeroconf.close()
    return list(found.values())


async def show_up(network: HivemindNetwork, group: str, run: RunId, run_name: str) -> LanPresence | None:
    """Let others on this peer's network find it. None where there is no multicast; they can still ask it by address.

    Raises:
        NetworkFailed: p2pd is gone.
    """
    host = network.config.host
    await network.tell_group(group, format_answer(run, run_name))
    addresses = fitting_addresses(await network.addresses(), loopback=host.startswith("127."))
    if not addresses:
        logger.warning("nobody is told of this peer by mDNS: it has no IPv4 address for others; see --host, --announce")
        return None
    try:
        peer = LanPeer(group=group, run=run, run_name=run_name, addresses=addresses)
        return await asyncio.to_thread(LanPresence, peer, host=host)
    except BadLan as error:
        logger.warning("%s", error)
        return None


def find_run(group: str, peers: Sequence[str] = (), *, host: str = ANY_HOST[0]) -> Join:
    """The run of a group: by mDNS, and by asking `peers`, as some networks let no multicast through.

    Raises:
        BadLan: nobody answers for the group, or several runs do.
        NetworkFailed: p2pd does not start.
    """
    found: list[LanPeer] = []
    try:
        found += search(group, host=host)
    except BadLan as error:
        if not peers:
            raise
        logger.info("%s", error)
    if peers and not found:
        for address, answer in asyncio.run(ask_group(group, peers, seconds=_ASK_SECONDS)).items():
            try:
                found.append(parse_answer(group, answer, address))
            except BadLan as error:
                logger.warning("%s", error)
    return choose_join(group, found)


def read_peers_file(path: Path) -> tuple[str, ...]:
    """Addresses of static peers, for networks where multicast is blocked.

    Raises:
        BadLan: the file cannot be read, or a line of it cannot be used.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_FILE_BYTES + 1)
    except OSError as error:
        raise BadLan(f"peers file {path} cannot be read ({error.strerror}); check --peers-file") from None
    if len(data) > _MOST_FILE_BYTES:
        raise BadLan(f"peers file {path} is longer than {_MOST_FILE_BYTES} bytes; one address a line is enough")
    return parse_peers_file(data.decode("utf-8-sig", "replace"), str(path))


def _open(host: str) -> Zeroconf:
    from zeroconf import InterfaceChoice, IPVersion, Zeroconf

    interfaces: object = InterfaceChoice.All if host in ANY_HOST else [host]
    try:
        return Zeroconf(interfaces=interfaces, ip_version=IPVersion.V4Only)  # type: ignore[arg-type]
    except (OSError, RuntimeError) as error:
        raise _blocked(error) from None


def _blocked(error: Exception) -> BadLan:
    return BadLan(f"this machine's network takes no multicast ({error}); name peers by --peer or --peers-file instead")


def _address(multiaddr: str) -> str:
    return multiaddr.split("/")[2]


def _port(multiaddr: str) -> int:
    return int(multiaddr.split("/")[4])
