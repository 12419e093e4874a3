"""How a peer enters a run: where it lives, whom it asks, and what it may use. Checked at birth."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from blocks.checks import check_kind, check_number, check_whole, refuse
from peers.config import NetworkConfig
from peers.records import MAX_NICKNAME_CHARS
from peers.routes.routing import EVERYBODY, RouteRules
from peers.streams.wire_format import WireFormat
from swarm.arguments import as_path
from swarm.errors import BadConfig

MAX_THREADS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerConfig:
    """How a peer enters a run. `state` None: the first free directory under `state_root`.

    `route_seconds` is how long work waits while some blocks have no live holder, `call_seconds` how long one host may
    take for one message before it counts as lost. `wire` is the form in which this peer's activations and gradients
    travel; None: as the run's settings say. `max_send` bounds what it sends, in bytes per second. `lan` is the group
    under which others on its network find it.

    Raises:
        BadConfig: a value is of the wrong kind or out of range, or the nickname cannot be shown; the message names it.
        BadLan: `lan` cannot name a group.
    """

    state_root: Path
    cache_dir: Path
    state: Path | None = None
    network: NetworkConfig = field(default_factory=NetworkConfig)
    rules: RouteRules = EVERYBODY
    num_threads: int | None = None
    model: str | None = None
    nickname: str = ""
    route_seconds: float = 300.0
    call_seconds: float = 120.0
    wire: WireFormat | None = None
    max_send: float = math.inf
    lan: str | None = None

    def __post_init__(self) -> None:
        for name in ("state_root", "cache_dir", "state"):
            if (given := getattr(self, name)) is not None or name != "state":
                object.__setattr__(self, name, as_path(name, given))  # still being born
        check_kind(BadConfig, "network", self.network, NetworkConfig, "swarm.NetworkConfig(...)")
        check_kind(BadConfig, "rules", self.rules, RouteRules, "swarm.RouteRules(...)")
        if self.num_threads is not None:
            check_whole(BadConfig, "num_threads", self.num_threads, 1, MAX_THREADS)
        check_kind(BadConfig, "model", self.model, (str, type(None)), "the path or the name of a model")
        check_kind(BadConfig, "nickname", self.nickname, str, "a string")
        check_number(BadConfig, "route_seconds", self.route_seconds, 0)
        check_number(BadConfig, "call_seconds", self.call_seconds, 1e-3)
        check_number(BadConfig, "max_send", self.max_send, 1)
        check_kind(BadConfig, "lan", self.lan, (str, type(None)), "the name of a group on this network")
        if self.lan is not None:
            from swarm.lan.records import check_group

            check_group(self.lan)
        if self.wire is not None and self.wire not in tuple(WireFormat):
            refuse(BadConfig, "wire", self.wire, f"one of {', '.join(WireFormat)}")
        object.__setattr__(self, "wire", None if self.wire is None else WireFormat(self.wire))
        if len(self.nickname) > MAX_NICKNAME_CHARS or not (self.nickname.isprintable() or not self.nickname):
            raise BadConfig(
                f"the nickname {self.nickname!r:.60} cannot be shown; use at most {MAX_NICKNAME_CHARS} characters, "
                "all printable"
            )
