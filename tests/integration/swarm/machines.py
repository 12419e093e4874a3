"""Machines of others, which enter a private run by invitations."""

from __future__ import annotations

from pathlib import Path

from peers.config import NetworkConfig
from peers.identity import load_or_create
from peers.network import PeerId
from peers.private.membership import Role
from swarm.join_string import Join, parse_join
from swarm.peer import Peer
from swarm.peer_config import PeerConfig
from swarm.private.inviting import invite
from swarm.state import IDENTITY_NAME
from tests.integration.swarm.small_swarm import SmallSwarm


class Machine:
    """Somebody else's: a state directory of its own, and an identity that `swarm id` prints."""

    def __init__(self, root: Path, swarm: SmallSwarm) -> None:
        self.root, self._swarm = root, swarm
        self.id: PeerId = load_or_create(root / IDENTITY_NAME).peer

    def invited(self, role: Role, *, days: float = 1) -> str:
        return invite(self._swarm.run, self.id, role, days=days).line

    def target(self, line: str) -> Join:
        target = parse_join(line)
        assert target.credential is not None
        return target

    def config(self, *, client_mode: bool = False) -> PeerConfig:
        return PeerConfig(
            state_root=self.root,
            cache_dir=self._swarm.cache_dir,
            network=NetworkConfig(host="127.0.0.1", client_mode=client_mode),
            num_threads=1,
            route_seconds=600,
        )

    def enter(self, name: str, line: str, *, client_mode: bool = False) -> Peer:
        self._swarm.peers[name] = peer = Peer.enter(self.target(line), self.config(client_mode=client_mode))
        return peer
