"""Entering a swarm: one known peer with a wrong clock keeps nobody out, a wrong clock of one's own does."""

from __future__ import annotations

import logging
from typing import cast

import pytest
from hivemind.dht.node import DHTNode

from peers import hivemind_bootstrap
from peers.errors import NetworkFailed
from peers.hivemind_bootstrap import join_swarm
from peers.hivemind_daemon import Daemon

ADDRESSES = tuple(f"/ip4/127.0.0.1/tcp/{port}/p2p/Qm{port}" for port in (1, 2, 3))


class Table:
    """A DHT node whose routing table is filled when somebody was reached."""

    node_id = b""
    was_filled = False

    async def find_nearest_nodes(self, ids: list[bytes]) -> None:
        self.was_filled = True


async def enter(monkeypatch: pytest.MonkeyPatch, answers: dict[str, str]) -> bool:
    """Whether the table was filled; an answer is empty, a reason, or "clock"."""

    async def greet(p2p: Daemon, node: DHTNode, address: str) -> str:
        if answers[address] == "clock":
            raise hivemind_bootstrap._ClockDiffers(f"this machine's clock differs from that of {address} by 10 s")
        return answers[address]

    monkeypatch.setattr(hivemind_bootstrap, "_greet", greet)
    table = Table()
    await join_swarm(cast(Daemon, None), cast(DHTNode, table), tuple(answers), seconds=5.0, must=True)
    return table.was_filled


@pytest.mark.parametrize("wrong", ADDRESSES)
async def test_one_peer_with_a_wrong_clock_keeps_nobody_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wrong: str
) -> None:
    answers = dict.fromkeys(ADDRESSES, "") | {wrong: "clock"}
    with caplog.at_level(logging.WARNING):
        assert await enter(monkeypatch, answers)
    assert f"clock differs from that of {wrong}" in caplog.text


async def test_a_clock_that_nobody_shares_is_ones_own_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = ADDRESSES
    with pytest.raises(NetworkFailed, match="this machine's clock differs"):
        await enter(monkeypatch, {first: "no answer", **dict.fromkeys(others, "clock")})


async def test_why_nobody_could_be_dialled_is_told_in_the_first_words_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """libp2p says the reason once; while it dials no more, it says just that."""
    dialling = "failed to dial: failed to dial Qm1: all dials failed * [/ip4/127.0.0.1/tcp/1] "
    refused = "dial tcp4 127.0.0.1:1: connect: connection refused"
    said = [f"{dialling}{refused}", f"{dialling}dial backoff"]

    async def greet(p2p: Daemon, node: DHTNode, address: str) -> str:
        return said.pop(0) if len(said) > 1 else said[0]

    monkeypatch.setattr(hivemind_bootstrap, "_greet", greet)
    with pytest.raises(NetworkFailed) as caught:
        await join_swarm(cast(Daemon, None), cast(DHTNode, Table()), ADDRESSES[:1], seconds=0.5, must=True)
    assert len(said) == 1, "it was not dialled again"
    assert f"({ADDRESSES[0]}: {refused});" in str(caught.value)
