"""Settings of a peer's network node, checked at birth."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_address

from blocks.checks import check_kind, check_number, check_whole, shown
from peers.errors import BadNetworkConfig

MULTIADDR = re.compile(r"(?:/[A-Za-z0-9.:_%-]{1,128}){2,16}")
MAX_MULTIADDR_CHARS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """How this peer listens and whom it asks first.

    `port` 0 takes any free port. `announce` replaces the addresses that others are told, for a peer behind a
    forwarded port. `client_mode` listens nowhere: for peers that nobody can dial. `use_relay` lets p2pd try circuits
    through the bootstrap peers, which carry no work: its relays cut each after 128 KiB. Counts bound incoming streams.

    Raises:
        BadNetworkConfig: a setting that cannot work; the message names it.
    """

    host: str = "0.0.0.0"
    port: int = 0
    bootstrap: tuple[str, ...] = ()
    announce: tuple[str, ...] = ()
    client_mode: bool = False
    use_relay: bool = False
    start_seconds: float = 30.0
    dial_seconds: float = 10.0
    max_streams: int = 512
    max_streams_per_peer: int = 64

    def __post_init__(self) -> None:
        check_whole(BadNetworkConfig, "network.port", self.port, 0, 65535)
        if not isinstance(self.host, str) or not _is_address(self.host):
            raise BadNetworkConfig(
                f"network.host is {shown(self.host)}; use an IP address of this machine, or 0.0.0.0 for all"
            )
        for name, addresses in (("bootstrap", self.bootstrap), ("announce", self.announce)):
            check_kind(BadNetworkConfig, f"network.{name}", addresses, (tuple, list), "a list of addresses")
            for address in addresses:
                check_kind(
                    BadNetworkConfig, f"network.{name}", address, str, "addresses such as /ip4/203.0.113.7/tcp/31330"
                )
                if len(address) > MAX_MULTIADDR_CHARS or MULTIADDR.fullmatch(address) is None:
                    raise BadNetworkConfig(
                        f"network.{name} has '{address[:80]}'; use an address such as /ip4/203.0.113.7/tcp/31330"
                    )
        for address in self.bootstrap:
            if "/p2p/" not in address:
                raise BadNetworkConfig(f"network.bootstrap has '{address}' without a peer id; it must end in /p2p/PEER")
        for name in ("start_seconds", "dial_seconds"):
            check_number(BadNetworkConfig, f"network.{name}", getattr(self, name), 0.1, 600)
        for name in ("max_streams", "max_streams_per_peer"):
            check_whole(BadNetworkConfig, f"network.{name}", getattr(self, name), 1, 4096)


def _is_address(host: str) -> bool:
    try:
        return bool(ip_address(host))
    except ValueError:
        return False
