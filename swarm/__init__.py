"""One running peer and everything that a person touches. Start at node.Node; scripts start at `init` and `join`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swarm.api import init as init
    from swarm.api import join as join
    from swarm.hf_trainer import attach as attach
    from swarm.lightning_callback import SwarmCallback as SwarmCallback
    from swarm.own_loop import Ending as Ending
    from swarm.own_loop import Member as Member
    from swarm.own_loop import member as member
    from swarm.peer import Peer as Peer
    from swarm.peer import PeerConfig as PeerConfig

_HOMES = {
    "init": "swarm.api",
    "join": "swarm.api",
    "Peer": "swarm.peer",
    "PeerConfig": "swarm.peer",
    "member": "swarm.own_loop",
    "Member": "swarm.own_loop",
    "Ending": "swarm.own_loop",
    "attach": "swarm.hf_trainer",
    "SwarmCallback": "swarm.lightning_callback",
}
__all__ = ["Ending", "Member", "Peer", "PeerConfig", "SwarmCallback", "attach", "init", "join", "member"]


def __dir__() -> list[str]:
    """For help() and completion, which otherwise see only what was used before."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    """The public names, imported when first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'swarm' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
