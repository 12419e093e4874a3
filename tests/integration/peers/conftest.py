from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from peers.config import NetworkConfig
from peers.hivemind_network import HivemindNetwork
from tests.fakes import RUN

Start = Callable[..., Awaitable[HivemindNetwork]]
LOOPBACK = NetworkConfig(host="127.0.0.1", start_seconds=20)


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts a node on loopback by name; all are stopped after the test."""
    networks: list[HivemindNetwork] = []

    async def start_one(
        name: str, *others: HivemindNetwork, address_book: Path | None = None, **changes: object
    ) -> HivemindNetwork:
        bootstrap = tuple([address for other in others for address in await other.addresses()])
        config = replace(LOOPBACK, **{"bootstrap": bootstrap, **changes})  # type: ignore[arg-type]
        network = await HivemindNetwork.start(
            config, run=RUN, identity_path=tmp_path / f"{name}.id", address_book=address_book
        )
        networks.append(network)
        return network

    yield start_one
    await asyncio.gather(*(network.stop() for network in networks))
