"""What `swarm publish` does once its words are parsed."""

from __future__ import annotations

from peers.config import NetworkConfig
from swarm.adapters.api import publish, withdraw
from swarm.adapters.publishing import own_run
from swarm.options import PublishOptions, Screen
from swarm.peer import Peer
from swarm.peer_config import PeerConfig
from swarm.reports.status import ADAPTER_COLUMNS

_START_SECONDS = 10.0


def run_publish(options: PublishOptions, screen: Screen) -> None:
    """Publish, withdraw, or show what is published."""
    own_run(options.target)  # before a swarm is entered
    config = PeerConfig(
        state_root=options.state_root,
        cache_dir=options.cache_dir,
        network=NetworkConfig(bootstrap=options.peers, client_mode=True, start_seconds=_START_SECONDS),
        model=options.model,
    )
    screen.now("entering the swarm")
    if options.directory is not None and options.name is not None:
        _publish(options, config, screen)
    elif options.withdraw is not None:
        number = withdraw(options.target, options.withdraw, config=config)
        screen.say(f"'{options.withdraw}' is withdrawn (list {number}); hosts let go of it within seconds")
    else:
        with Peer.enter(options.target, config) as peer:
            status = peer.status()
        count = len(status.catalogue.adapters)
        title = f"{status.name}: {count or 'no'} published adapter{'' if count == 1 else 's'}"
        screen.table(title, ADAPTER_COLUMNS, status.adapter_rows())


def _publish(options: PublishOptions, config: PeerConfig, screen: Screen) -> None:
    assert options.directory is not None
    assert options.name is not None
    done = publish(
        options.target,
        options.directory,
        name=options.name,
        wait_seconds=options.wait_seconds,
        config=config,
        show=lambda spread: screen.now(spread.words()),
    )
    screen.say(f"'{options.name}' is published (list {done.number}): {done.spread.words()}")
    if not done.spread.fewest:
        screen.say("texts with it wait until all blocks have it: publish it again, with a longer --wait")
    elif done.spread.lacking:
        screen.say("the others fetch it from these, where they have room (swarm join says why not)")
