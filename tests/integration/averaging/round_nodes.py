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
from hivemind.compression import NoCompression

from averaging.averager import Averager, RoundOutcome
from averaging.config import AveragingConfig
from averaging.hivemind_allreduce import ClassRunner
from averaging.hivemind_exchange import HivemindExchange
from blocks.spans import Span, UnitId, unit_of
from peers.config import NetworkConfig
from peers.hivemind_network import HivemindNetwork

RUN = "run-of-the-round-tests"
CONFIG = AveragingConfig(matchmaking_seconds=3, request_seconds=1, reduce_seconds=20, vote_seconds=10)
VALUES = 20_000  # per tensor: a dozen parts in a class of three, a few milliseconds of work


@dataclass(kw_only=True)
class Member:
    network: HivemindNetwork
    exchange: HivemindExchange
    span: Span
    weight: float
    config: AveragingConfig

    def units(self) -> dict[UnitId, dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(int(self.weight * 1000))
        return {
            unit_of("default", block): {
                "A": torch.randn(4, VALUES // 4, generator=generator),
                "B": torch.randn(VALUES, generator=generator),
            }
            for block in self.span.blocks()
        }

    async def round(self, number: int, *, begin_at: float, expected: int) -> RoundOutcome:
        units = self.units()

        async def read():
            return units

        averager = Averager(self.exchange, self.network.peer_id, "layout", self.config)
        weights = dict.fromkeys(units, self.weight)
        return await averager.run_round(number, begin_at=begin_at, expected=expected, weights=weights, read=read)


@contextlib.asynccontextmanager
async def member(
    identity_path: Path,
    span: Span,
    weight: float,
    *,
    initial_peers: Sequence[str] = (),
    exchange_type: type[HivemindExchange] = HivemindExchange,
    config: AveragingConfig = CONFIG,
) -> AsyncIterator[Member]:
    network = await HivemindNetwork.start(
        NetworkConfig(host="127.0.0.1", bootstrap=tuple(initial_peers)), run=RUN, identity_path=identity_path
    )
    try:
        exchange = exchange_type(network, network.identity, RUN, config)
        await exchange.start()
        yield Member(network=network, exchange=exchange, span=span, weight=weight, config=config)
        await exchange.stop()
    finally:
        await network.stop()


async def address_of(peer: Member) -> str:
    return (await peer.network.addresses())[0]


@contextlib.asynccontextmanager
async def members(
    directory: Path, spans: Sequence[Span], types: Sequence[type[HivemindExchange]] = ()
) -> AsyncIterator[list[Member]]:
    """One peer per span with weights 1, 2, ...; all on this loop, each with a p2pd of its own."""
    async with contextlib.AsyncExitStack() as stack:
        found: list[Member] = []
        for index, span in enumerate(spans):
            peer = member(
                directory / f"key{index}",
                span,
                index + 1.0,
                initial_peers=[await address_of(found[0])] if found else (),
                exchange_type=types[index] if types else HivemindExchange,
            )
            found.append(await stack.enter_async_context(peer))
        yield found


class DyingExchange(HivemindExchange):
    """Its process is gone (kill -9) when it has to encode its n-th part."""

    parts_left = 0

    def _runner(self, group, unit_class, tensors) -> ClassRunner:
        runner = super()._runner(group, unit_class, tensors)
        exchange = self

        class Dying(NoCompression):
            def compress(self, *args, **kwargs):
                exchange.parts_left -= 1
                if exchange.parts_left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().compress(*args, **kwargs)

        # What it sends as a holder, and the sums that it sends as a reducer.
        runner.tensor_part_container.compression = runner._codec.compression = Dying()
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
