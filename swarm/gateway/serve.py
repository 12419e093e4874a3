"""Runs the gateway: enters each swarm, then serves until stopped."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from blocks.decoding.speculation import LOOKUP_TOKENS, PLAIN, Speculation
from swarm.errors import SwarmError
from swarm.gateway.app import make_app
from swarm.gateway.askers import Askers
from swarm.gateway.catalog import make_catalog, read_words
from swarm.gateway.desk import Desk, DeskLimits
from swarm.gateway.door import DoorRules
from swarm.gateway.host_names import LOCAL_NAMES, clean_name, is_loopback
from swarm.gateway.keys import NO_LIMITS, AskerLimits, read_keys
from swarm.gateway.live_catalog import LiveCatalog
from swarm.gateway.metrics import Metrics
from swarm.gateway.routes import Gateway
from swarm.gateway.watching import SwarmWatch, WatchConfig
from swarm.options import ServeOptions
from swarm.peer import Peer

logger = logging.getLogger(__name__)

_GOODBYE_SECONDS = 5
_MAX_CONNECTIONS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayConfig:
    """How the gateway serves. `keys` is a file of API keys (keys.read_keys); without one anybody may ask.

    `asker` bounds each key that has no bounds of its own, or each address. `lookup`: tokens are guessed from the text
    so far, so that the hosts verify several in one round trip.
    """

    keys: Path | None = None
    asker: AskerLimits = NO_LIMITS
    desk: DeskLimits = field(default_factory=DeskLimits)
    watch: WatchConfig = field(default_factory=WatchConfig)
    door: DoorRules = field(default_factory=DoorRules)
    most_tokens: int = 4096
    default_tokens: int = 512
    lookup: bool = True
    num_threads: int | None = None


def gateway_config(options: ServeOptions) -> GatewayConfig:
    """What `swarm serve` was asked for.

    Raises:
        BadConfig: the file of keys cannot be used.
    """
    config = GatewayConfig(
        keys=options.keys,
        asker=AskerLimits(requests_per_minute=options.requests_per_minute or None),
        desk=DeskLimits(writing=options.texts, waiting=options.queue, wait_seconds=max(options.wait_seconds, 60.0)),
        door=DoorRules(names=_names(options)),
        most_tokens=options.max_tokens,
        lookup=options.lookup,
        num_threads=options.threads or None,
    )
    if config.keys is not None:
        read_keys(config.keys, config.asker)  # before a swarm is entered for it
    return config


def _names(options: ServeOptions) -> frozenset[str]:
    """By which names the gateway is asked: those that were given; and this machine's own, where others may ask."""
    names = LOCAL_NAMES | {clean_name(name) for name in options.allow_hosts}
    if is_loopback(options.host):
        return names
    whole = clean_name(socket.gethostname())
    short = whole.partition(".")[0]
    return names | {clean_name(options.host), whole, short, f"{short}.local"}


class GatewayServer:
    """One server over peers that have entered their swarms. `run` in a thread of its own, `stop` from any."""

    def __init__(self, peers: Sequence[Peer], config: GatewayConfig) -> None:
        """Reads the keys and loads what is needed of the models.

        Raises:
            BadConfig: the keys cannot be used.
            BlockError, SwarmError: a model is not on this machine.
        """
        self._failure: BaseException | None = None
        keys = () if config.keys is None else read_keys(config.keys, config.asker)
        watch = SwarmWatch(peers, config.watch)
        metrics = Metrics(watch)
        speculation = Speculation(lookup=LOOKUP_TOKENS) if config.lookup else PLAIN
        self.gateway = Gateway(
            catalog=LiveCatalog(make_catalog(peers, read_words, watch.is_live), watch.published),
            desk=Desk(config.desk, metrics, speculation=speculation, num_threads=config.num_threads),
            watch=watch,
            metrics=metrics,
            askers=Askers(time.monotonic),
            keys=keys,
            anonymous=config.asker,
            most_tokens=config.most_tokens,
            default_tokens=min(config.default_tokens, config.most_tokens),
        )
        app = make_app(self.gateway, config.door, self._failed)
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                lifespan="on",
                limit_concurrency=_MAX_CONNECTIONS,
                timeout_graceful_shutdown=_GOODBYE_SECONDS,
            )
        )

    def run(self, listening: socket.socket) -> None:
        """Serve until `stop`, or a signal, which is raised again afterwards.

        Raises:
            PeerError: a peer cannot go on.
            SwarmError: the server did not start.
        """
        self._server.run(sockets=[listening])
        if self._failure is not None:
            raise self._failure
        if not self._server.started:
            raise SwarmError("the gateway did not start; its log says why (use swarm -v)")

    def stop(self) -> None:
        """End `run`."""
        self._server.should_exit = True

    def _failed(self, error: BaseException) -> None:
        self._failure = error
        self.stop()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; `port` 0 takes any free one.

    Raises:
        SwarmError: the address cannot be used.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (while ")[0]  # Python adds the address, which is said anyway
        raise SwarmError(
            f"cannot listen on {host} port {port} ({why}); choose others with --host and --port"
        ) from error


def serve(
    enter: Sequence[Callable[[], Peer]],
    config: GatewayConfig,
    listening: socket.socket,
    ready: Callable[[GatewayServer], None],
) -> None:
    """Enter the swarms, and serve them until stopped. `ready` is called before the first request is taken.

    Raises:
        SwarmError, PeerError, BlockError: one line that says what is wrong and what to do.
    """
    with ExitStack() as stack:
        stack.enter_context(listening)
        peers = [stack.enter_context(each()) for each in enter]
        server = GatewayServer(peers, config)
        ready(server)
        server.run(listening)
