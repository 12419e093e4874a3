"""How a peer enters a run: where it lives, whom it asks, and what it may use. Checked at birth."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from peers.config import NetworkConfig
from peers.records import MAX_NICKNAME_CHARS
from peers.routes.routing import EVERYBODY, RouteRules
from peers.streams.wire_format import WireFormat
from swarm.errors import BadConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerConfig:
    """How a peer enters a run. `state` None: the first free directory under `state_root`.

    `route_seconds` is how long work waits while some blocks have no live holder, `call_seconds` how long one host may
    take for one message before it counts as lost. `wire` is the form in which this peer's activations and gradients
    travel; None: as the run's settings say. `max_send` bounds what it sends, in bytes per second. `lan` is the group
    under which others on its network find it.

    Raises:
        BadConfig: the nickname cannot be shown.
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
        if len(self.nickname) > MAX_NICKNAME_CHARS or not (self.nickname.isprintable() or not self.nickname):
            raise BadConfig(
                f"the nickname {self.nickname!r:.60} cannot be shown; use at most {MAX_NICKNAME_CHARS} characters, "
                "all printable"
            )
