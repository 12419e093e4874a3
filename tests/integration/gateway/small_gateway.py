"""A gateway over a small swarm in this process, asked through real sockets by the official client."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from openai import OpenAI

from swarm.gateway.serve import GatewayConfig, GatewayServer, listen
from swarm.gateway.watching import WatchConfig
from swarm.peer import Peer

KEY = "sk-any-key-will-do"
QUICK = WatchConfig(often_seconds=0.3, seldom_seconds=0.5, reader_seconds=60.0)


@dataclass(frozen=True, kw_only=True)
class SmallGateway:
    """A running server and where it is."""

    server: GatewayServer
    url: str

    def client(self, key: str = KEY) -> OpenAI:
        """Which fails at once instead of asking again."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)


@contextmanager
def gateway_over(peers: Sequence[Peer], config: GatewayConfig | None = None) -> Iterator[SmallGateway]:
    """Serves `peers`, which stay the caller's, until the context ends."""
    server = GatewayServer(peers, config or GatewayConfig(watch=QUICK, most_tokens=200))
    with listen("127.0.0.1", 0) as listening:
        failed: list[BaseException] = []

        def run() -> None:
            try:
                server.run(listening)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run, name="gateway")
        thread.start()
        try:
            yield SmallGateway(server=server, url=f"http://127.0.0.1:{listening.getsockname()[1]}")
        finally:
            server.stop()
            thread.join(timeout=60)
    assert not thread.is_alive(), "the gateway does not end"
    assert not failed, failed
