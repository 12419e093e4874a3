"""Real nodes for rounds on loopback; as a script, a peer that kills itself in the middle of its all-reduce."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from averaging.averager import Averager, Link, RoundOutcome
from averaging.config import AveragingConfig
from averaging.exchange import Brought, Call
from averaging.hivemind_allreduce import ClassRunner
from averaging.hivemind_exchange import HivemindExchange
from averaging.merging import UnitView
from averaging.unit_round import UnitInput, UnitRules
from blocks.spans import Span, UnitId, unit_of
from peers.config import NetworkConfig
from peers.hivemind_network import HivemindNetwork
from peers.network import PeerId

RUN = "run-of-the-round-tests"
CONFIG = AveragingConfig(matchmaking_seconds=6, request_seconds=2, reduce_seconds=30, vote_seconds=15)
BLOCKS = 6
VALUES = 20_000  # per tensor: a dozen parts in a class of three, a few milliseconds of work


@dataclass(kw_only=True)
class Member:
    network: HivemindNetwork
    exchange: HivemindExchange
    span: Span
    weight: float
    config: AveragingConfig
    distrusts: frozenset[PeerId] = frozenset()

    def units(self) -> dict[UnitId, dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(int(self.weight * 1000))
        return {
            unit_of("default", block): {
                "A": torch.randn(4, VALUES // 4, generator=generator),
                "B": torch.randn(VALUES, generator=generator),
            }
            for block in self.span.blocks()
        }

    def inputs(self) -> dict[UnitId, UnitInput]:
        """Trained from zeros, so that the change is the value itself."""
        return {
            unit: UnitInput(
                view=UnitView(
                    unit=unit,
                    round=0,
                    live=live,
                    anchor={name: torch.zeros(tensor.shape) for name, tensor in live.items()},
                    outer={},
                    scaling=1.0,
                )
            )
            for unit, live in self.units().items()
        }

    def __post_init__(self) -> None:
        shapes = {"A": (4, VALUES // 4), "B": (VALUES,)}
        everything = {unit_of("default", block): shapes for block in range(BLOCKS)}
        self.use(UnitRules(self.config.recipe, shapes=everything))

    def use(self, rules: UnitRules) -> None:
        self.averager = Averager(self.exchange, self.network.peer_id, "layout", self.config, rules=rules)

    async def round(self, number: int, *, begin_at: float, expected: int) -> RoundOutcome:
        inputs = self.inputs()

        async def read():
            return inputs

        window = self.config.matchmaking_seconds
        deadline = begin_at + 2 * window + self.config.request_seconds
        call = Call(begin_at=begin_at, window=window, deadline=deadline, expected=expected)
        brought = dict.fromkeys(inputs, Brought(samples=self.weight))
        link = Link(client_mode=self.network.config.client_mode)
        return await self.averager.run_round(number, call, brought, read, link=link, distrusts=self.distrusts)


@contextlib.asynccontextmanager
async def member(
    identity_path: Path,
    span: Span,
    weight: float,
    *,
    initial_peers: Sequence[str] = (),
    exchange_type: type[HivemindExchange] = HivemindExchange,
    config: AveragingConfig = CONFIG,
    kind: type[Member] = Member,
    network_config: NetworkConfig | None = None,
) -> AsyncIterator[Member]:
    network_config = network_config or NetworkConfig(host="127.0.0.1", bootstrap=tuple(initial_peers))
    network = await HivemindNetwork.start(network_config, run=RUN, identity_path=identity_path)
    try:
        exchange = exchange_type(network, network.identity, RUN, config)
        await exchange.start()
        yield kind(network=network, exchange=exchange, span=span, weight=weight, config=config)
        await exchange.stop()
    finally:
        await network.stop()


async def address_of(peer: Member) -> str:
    return (await peer.network.addresses())[0]


@contextlib.asynccontextmanager
async def members(
    directory: Path,
    spans: Sequence[Span],
    types: Sequence[type[HivemindExchange]] = (),
    config: AveragingConfig = CONFIG,
    kind: type[Member] = Member,
    behind_nat: Sequence[int] = (),
) -> AsyncIterator[list[Member]]:
    """One peer per span with weights 1, 2, ...; all on this loop, each with a p2pd of its own. Those of `behind_nat`,
    by place, can dial others and be dialled by nobody; the first is none of them.
    """
    async with contextlib.AsyncExitStack() as stack:
        found: list[Member] = []
        for index, span in enumerate(spans):
            known = (await address_of(found[0]),) if found else ()
            peer = member(
                directory / f"key{index}",
                span,
                index + 1.0,
                network_config=NetworkConfig(host="127.0.0.1", bootstrap=known, client_mode=index in behind_nat),
                exchange_type=types[index] if types else HivemindExchange,
                config=config,
                kind=kind,
            )
            found.append(await stack.enter_async_context(peer))
        yield found


class DyingExchange(HivemindExchange):
    """Its process is gone (kill -9) when it has to encode its n-th part."""

    parts_left = 0

    def _runner(self, group, work) -> ClassRunner:
        runner = super()._runner(group, work)
        encode = runner._codec.encode

        def encode_or_die(tensor):
            self.parts_left -= 1
            if self.parts_left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(tensor)

        runner._codec.encode = encode_or_die  # what it sends as a holder, and the sums that it sends as a reducer
        return runner


async def _die_in_a_round(identity_path: str, address: str, start: str, end: str, parts_left: str) -> None:
    """Say that it stands, wait for the moment on stdin, and take part until death."""
    torch.set_num_threads(1)
    span = Span(int(start), int(end))
    async with member(Path(identity_path), span, 9.0, initial_peers=[address], exchange_type=DyingExchange) as peer:
        peer.exchange.parts_left = int(parts_left)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        begin_at = float(await asyncio.to_thread(sys.stdin.readline))
        await peer.round(1, begin_at=begin_at, expected=4)


if __name__ == "__main__":
    asyncio.run(_die_in_a_round(*sys.argv[1:]))
