from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from peers.hivemind_network import HivemindNetwork
from peers.identity import load_or_create
from peers.network import PeerId
from peers.private.gate import MemberConfig
from peers.private.membership import Role
from tests.fakes import RUN
from tests.integration.peers.conftest import LOOPBACK
from tests.private_runs import Owner

Start = Callable[..., Awaitable[HivemindNetwork]]


@pytest.fixture
def owner() -> Owner:
    return Owner()


@pytest.fixture
def peer_of(tmp_path: Path) -> Callable[[str], PeerId]:
    """The id of the peer of a name, before it starts."""
    return lambda name: load_or_create(tmp_path / f"{name}.id").peer


@pytest.fixture
async def start(tmp_path: Path, owner: Owner, peer_of: Callable[[str], PeerId]) -> AsyncIterator[Start]:
    """Starts a node of the private run by name: a host with a good membership, unless `members` says otherwise."""
    networks: list[HivemindNetwork] = []

    async def start_one(
        name: str,
        *others: HivemindNetwork,
        role: Role = Role.HOST,
        members: MemberConfig | str | None = "own",
        **changes: object,
    ) -> HivemindNetwork:
        if isinstance(members, str):
            members = owner.members(owner.sign(peer_of(name), role))
        bootstrap = tuple([address for other in others for address in await other.addresses()])
        config = replace(LOOPBACK, **{"bootstrap": bootstrap, **changes})  # type: ignore[arg-type]
        network = await HivemindNetwork.start(config, run=RUN, identity_path=tmp_path / f"{name}.id", members=members)
        networks.append(network)
        return network

    yield start_one
    await asyncio.gather(*(network.stop() for network in networks))
