from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from parts.tiny_chat import save_tiny_chat

from swarm.peer import Peer
from tests.integration.gateway.small_gateway import SmallGateway, gateway_over
from tests.integration.swarm.small_swarm import BACK, FRONT, WHOLE, SmallSwarm, host_of, random_samples, until

ROUNDS = {
    "training": {"batch_size": 4, "learning_rate": 3e-2},
    "rounds": {"round_samples": 16},
    "adapter": {"lora_rank": 4},
}


@dataclass(frozen=True, kw_only=True)
class Served:
    """Two runs on one base model, `tales` with a trained adapter and `news` with an untouched one."""

    tales: SmallSwarm
    news: SmallSwarm
    clients: tuple[Peer, Peer]
    gateway: SmallGateway

    @property
    def hosts(self) -> list[Peer]:
        return [self.tales.peers["a"], self.tales.peers["b"], self.news.peers["c"]]


@pytest.fixture(scope="session")
def tiny_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random llama of six blocks that can chat."""
    return save_tiny_chat(tmp_path_factory.mktemp("models") / "tiny-chat")


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_chat: Path) -> Iterator[Served]:
    """Made once for all tests that leave it as it is."""
    root = tmp_path_factory.mktemp("served")
    tales, news = (
        SmallSwarm.create(root / name, str(tiny_chat), root / "cache", ROUNDS, name=name) for name in ("tales", "news")
    )
    try:
        hosts = tales.hosts(a=FRONT, b=BACK)
        news.host("c", WHOLE)
        clients = (tales.enter("client"), news.enter("client"))
        clients[0].train(random_samples(16), steps=4)
        until(lambda: all(host_of(host).shelf.newest.round >= 1 for host in hosts), "round 1")
        assert clients[0].wait_for_round(1, seconds=120)
        with gateway_over(clients) as gateway:
            yield Served(tales=tales, news=news, clients=clients, gateway=gateway)
    finally:
        tales.close()
        news.close()
