"""One running peer and everything that a person touches. Start at node.Node; scripts start at `init` and `join`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blocks.spans import Span as Span
    from peers.config import NetworkConfig as NetworkConfig
    from peers.routes.routing import RouteRules as RouteRules
    from swarm.adapters.api import publish as publish
    from swarm.adapters.api import withdraw as withdraw
    from swarm.api import init as init
    from swarm.api import join as join
    from swarm.hosts.loading import HostingConfig as HostingConfig
    from swarm.model import Sampling as Sampling
    from swarm.own_loops.hf_trainer import attach as attach
    from swarm.own_loops.lightning_callback import SwarmCallback as SwarmCallback
    from swarm.own_loops.member import Ending as Ending
    from swarm.own_loops.member import Member as Member
    from swarm.own_loops.member import member as member
    from swarm.peer import Peer as Peer
    from swarm.peer_config import PeerConfig as PeerConfig

_HOMES = {
    "init": "swarm.api",
    "join": "swarm.api",
    "publish": "swarm.adapters.api",
    "withdraw": "swarm.adapters.api",
    "Peer": "swarm.peer",
    "PeerConfig": "swarm.peer_config",
    "member": "swarm.own_loops.member",
    "Member": "swarm.own_loops.member",
    "Ending": "swarm.own_loops.member",
    "attach": "swarm.own_loops.hf_trainer",
    "SwarmCallback": "swarm.own_loops.lightning_callback",
    "HostingConfig": "swarm.hosts.loading",
    "NetworkConfig": "peers.config",
    "RouteRules": "peers.routes.routing",
    "Sampling": "swarm.model",
    "Span": "blocks.spans",
}
__all__ = [
    "Ending",
    "HostingConfig",
    "Member",
    "NetworkConfig",
    "Peer",
    "PeerConfig",
    "RouteRules",
    "Sampling",
    "Span",
    "SwarmCallback",
    "attach",
    "init",
    "join",
    "member",
    "publish",
    "withdraw",
]


def __dir__() -> list[str]:
    """For help() and completion, which otherwise see only what was used before."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    """The public names, imported when first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'swarm' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
