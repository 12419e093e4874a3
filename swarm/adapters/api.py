"""Publishing from scripts and the command line: enters the run, changes its list, hands the adapter over, leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from blocks.checks import check_kind, check_number
from peers.config import NetworkConfig
from peers.published.catalogue import Published
from swarm.adapters.publishing import own_run, prepare, publish_to_swarm, until_spread, withdraw_from_swarm
from swarm.adapters.spreading import Spread
from swarm.api import CACHE, STATE, Target, enter, resolve
from swarm.arguments import as_path
from swarm.config_file import CONFIG_NAME, load_config
from swarm.errors import BadConfig
from swarm.peer_config import PeerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """What was published, the number of the run's list, and how far it came while this peer was there."""

    adapter: Published
    number: int
    spread: Spread


def publish(
    target: Target,
    directory: str | Path,
    *,
    name: str,
    wait_seconds: float = 300.0,
    config: PeerConfig | None = None,
    show: Callable[[Spread], None] = lambda _: None,
) -> Publication:
    """Have the hosts of your run serve the adapter in a peft directory, under `name`, beside the one that they train.

    `target` is the run's directory, with its owner's key. Stays until every live host has it, or for `wait_seconds`;
    then hosts fetch it from each other. `show` is told how far it is.

    Raises:
        BadAdapter: the adapter cannot be read, or does not fit the run.
        BadConfig: the name is not allowed, or the run is not yours.
        BadRecord: too many are published.
        SwarmError, PeerError: the run cannot be entered.
    """
    check_kind(BadConfig, "name", name, str, "a string")
    check_number(BadConfig, "wait_seconds", wait_seconds, 0)
    own, config = own_run(resolve(target)), _config(config)
    prepared = prepare(name, as_path("directory", directory), load_config(own.path / CONFIG_NAME), config)
    with enter(target, config) as peer:
        number = peer.run(publish_to_swarm(peer.node, own, prepared))
        spread = peer.run(until_spread(peer.node, prepared.adapter, seconds=wait_seconds, show=show))
    return Publication(adapter=prepared.adapter, number=number, spread=spread)


def withdraw(target: Target, name: str, *, config: PeerConfig | None = None) -> int:
    """Have the hosts of your run serve a published adapter no more; returns the number of the run's list.

    Raises:
        BadConfig: there is none of that name, or the run is not yours.
        SwarmError, PeerError: the run cannot be entered.
    """
    own = own_run(resolve(target))
    with enter(target, _config(config)) as peer:
        return peer.run(withdraw_from_swarm(peer.node, own, name))


def _config(config: PeerConfig | None) -> PeerConfig:
    """A peer that only dials, as it holds no blocks."""
    if config is None:
        config = PeerConfig(state_root=STATE.expanduser(), cache_dir=CACHE.expanduser())
    check_kind(BadConfig, "config", config, PeerConfig, "swarm.PeerConfig(...), or leave it out")
    network: NetworkConfig = replace(config.network, client_mode=True)
    return replace(config, network=network)
