"""As a script: a peer that nobody can dial holds blocks, trains until a file appears, and says a text."""

from __future__ import annotations

import sys
from pathlib import Path

from blocks.spans import parse_span
from peers.config import NetworkConfig
from swarm.api import join
from swarm.peer_config import PeerConfig


def main(target: str, data: str, state: str, end: str) -> None:
    config = PeerConfig(
        state_root=Path(state).parent,
        state=Path(state),
        cache_dir=Path(state) / "cache",
        network=NetworkConfig(client_mode=True),
        num_threads=1,
    )
    with join(target, blocks="0:3", config=config) as peer:
        assert peer.node.hosting is not None
        assert peer.node.hosting.host.span == parse_span("0:3", 6)
        while not Path(end).exists():
            peer.train([data], steps=8)
        sys.stdout.write(peer.generate("w3 w4 w5", max_new_tokens=4) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
