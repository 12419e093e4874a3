"""Peers of rounds, each a process with a node of its own, and one round among some of them as the parent sees it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import uvloop
from parts.children import Child, Pipe, ask, children, moment

from averaging import merge
from averaging.arrivals import Arrivals
from averaging.averager import Averager, RoundOutcome
from averaging.config import AveragingConfig
from averaging.errors import RoundFailed
from averaging.exchange import Brought, Call, ClassWork, Group, Reduced
from averaging.hivemind_exchange import HivemindExchange
from averaging.merging import UnitView
from averaging.recipe import Recipe
from averaging.unit_round import UnitInput
from blocks.spans import UnitId, unit_of
from peers.config import NetworkConfig
from peers.hivemind_network import HivemindNetwork
from swarm.local import LOOPBACK

BLOCKS, RANK, TARGETS = 30, 8, ("q", "v")
LEAD_SECONDS = 0.3  # not counted: in a swarm the records agree on the moment while training goes on
_MOST_WINDOW_SECONDS = 30.0
REDUCING = "reducing"
PHASES = ("matchmaking", "read", "reduce", "vote")
Units = Mapping[UnitId, Mapping[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """One peer: where its key is, which tensors it has, who is there already."""

    directory: Path
    index: int
    parameters: int
    bootstrap: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Play:
    """Take part in one round, and say when the all-reduce begins if `tell`."""

    number: int
    begin_at: float
    window: float
    expected: int
    tell: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class UseCodec:
    """Go on with updates that travel in this codec."""

    codec: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Compare:
    """How far is the last result from the mean of these peers' tensors, at most?"""

    indices: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Played:
    """One round as one peer saw it. `whole` when every unit was averaged among all who were expected;
    `met` counts its group, 0 without one; `allreduce_seconds` are of flat vectors, as a part of the phase `reduce`.
    """

    seconds: float
    whole: bool
    phases: Mapping[str, float]
    met: int = 0
    applied: int = 0
    digest: bytes = b""
    bytes_sent: int = 0
    allreduce_seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One round of several peers: the slowest counts, in each phase too."""

    seconds: float
    whole: bool
    phases: Mapping[str, float]
    bytes_sent: float
    allreduce_seconds: float
    reasons: tuple[str, ...]


class Crew:
    """Peers in processes of their own. The first is the one that the others join at."""

    def __init__(self, directory: Path, parameters: int, processes: list[Child]) -> None:
        self.peers = processes
        self.number = 0
        self._directory, self._parameters = directory, parameters
        config = AveragingConfig()
        self._arrivals = Arrivals(
            first=config.matchmaking_seconds, least=2 * config.request_seconds, most=_MOST_WINDOW_SECONDS
        )

    @classmethod
    @contextmanager
    def of(cls, directory: Path, num_peers: int, parameters: int) -> Iterator[Crew]:
        """`num_peers` of them, ready; all end with the context."""
        directory.mkdir()
        with children() as processes:
            crew = cls(directory, parameters, processes)
            address = crew._launch(()).receive()
            for child in [crew._launch((address,)) for _ in range(num_peers - 1)]:
                child.receive()
            yield crew

    def play(self, peers: Sequence[Child]) -> Row:
        """One round among `peers`, from the agreed moment until the last of them has its outcome."""
        play = self.next(len(peers), moment(LEAD_SECONDS))
        found: list[Played] = ask(peers, play)
        # The first of them stands for the one who proposes, and whose window holds.
        met = found[0].met
        self._arrivals.saw(found[0].phases["matchmaking"] if met else play.window, is_full=met == len(peers))
        return row_of(found)

    def next(self, expected: int, begin_at: float) -> Play:
        """A new round. How long its group waits for all is learnt, as in swarm/units/rounds.py."""
        self.number += 1
        return Play(number=self.number, begin_at=begin_at, window=self._arrivals.window(), expected=expected)

    def mean_error(self, peers: Sequence[Child]) -> float:
        """How far the last result is from the mean that it should be, as a part of the largest value."""
        indices = tuple(self.peers.index(peer) for peer in peers)
        return float(ask(peers[:1], Compare(indices=indices))[0])

    def use_codec(self, codec: str) -> None:
        """Let updates travel in it from now on, at every peer."""
        ask(self.peers, UseCodec(codec=codec))

    def _launch(self, bootstrap: tuple[str, ...]) -> Child:
        index = len(self.peers)
        setup = Setup(directory=self._directory, index=index, parameters=self._parameters, bootstrap=bootstrap)
        child = Child(f"peer {index} of rounds", serve, setup)
        self.peers.append(child)
        return child


def row_of(found: Sequence[Played]) -> Row:
    """What the peers say of one round. Results that differ in a bit end the benchmark."""
    digests = {each.digest for each in found if each.whole}
    if len(digests) > 1:
        raise SystemExit("peers of one round hold different results")
    return Row(
        seconds=max(each.seconds for each in found),
        whole=all(each.whole for each in found),
        phases={name: max(each.phases[name] for each in found) for name in PHASES},
        bytes_sent=sum(each.bytes_sent for each in found) / len(found),
        allreduce_seconds=max(each.allreduce_seconds for each in found),
        reasons=tuple(each.reason for each in found if each.reason),
    )


def units_of(index: int, parameters: int) -> Units:
    """A LoRA's tensors of every block, others for each peer."""
    generator = torch.Generator().manual_seed(index)
    width = parameters // (BLOCKS * len(TARGETS) * 2 * RANK)
    return {
        unit_of("default", block): {
            f"{target}.{name}": torch.randn(shape, generator=generator)
            for target in TARGETS
            for name, shape in (("lora_A", (RANK, width)), ("lora_B", (width, RANK)))
        }
        for block in range(BLOCKS)
    }


def _trained_from_zeros(unit: UnitId, live: Mapping[str, torch.Tensor]) -> UnitInput:
    """So that the change, which is what travels, is the value itself."""
    anchor = {name: torch.zeros(tensor.shape) for name, tensor in live.items()}
    return UnitInput(view=UnitView(unit=unit, round=0, live=live, anchor=anchor, outer={}, scaling=1.0))


def weight_of(index: int) -> float:
    """The samples of a peer."""
    return index + 1.0


def serve(pipe: Pipe, setup: Setup) -> None:
    """The work of such a process: a node on a uvloop loop, as in swarm/, that plays what the parent asks for."""
    torch.set_num_threads(1)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # each stream that ends with a killed peer has a traceback
    uvloop.run(_serve(pipe, setup))


class _TellingExchange(HivemindExchange):
    """Calls `on_reduce` when its all-reduce begins, and notes how long it takes."""

    on_reduce: Callable[[], None] | None = None
    seconds = 0.0

    async def reduce(self, group: Group, work: Sequence[ClassWork]) -> Mapping[bytes, Reduced]:
        """As the base's."""
        if self.on_reduce is not None:
            self.on_reduce()
        began = time.perf_counter()
        reduced = await super().reduce(group, work)
        self.seconds = time.perf_counter() - began
        return reduced


class _Peer:
    """What one process does for its parent."""

    def __init__(self, pipe: Pipe, setup: Setup, network: HivemindNetwork) -> None:
        self._pipe, self._setup, self._network = pipe, setup, network
        self._units = units_of(setup.index, setup.parameters)
        self._inputs = {unit: _trained_from_zeros(unit, live) for unit, live in self._units.items()}
        self._last: Units = {}

    async def start(self, config: AveragingConfig, run: str) -> None:
        """An exchange and an averager with these settings."""
        self._config = config
        self._exchange = _TellingExchange(self._network, self._network.identity, run, config)
        await self._exchange.start()
        self._averager = Averager(self._exchange, self._network.peer_id, "bench", config, now=self._network.dht_time)

    async def stop(self) -> None:
        """End the exchange."""
        await self._exchange.stop()

    async def use_codec(self, command: UseCodec) -> None:
        """Begin anew, under another name."""
        await self.stop()
        recipe = Recipe(codec=command.codec)
        await self.start(AveragingConfig(recipe=recipe), f"bench-{command.codec}")

    async def play(self, command: Play) -> Played:
        """One round, to its end."""
        self._exchange.on_reduce = partial(self._pipe.send, REDUCING) if command.tell else None
        call = Call(
            begin_at=command.begin_at,
            window=command.window,
            deadline=command.begin_at + 2 * command.window + self._config.request_seconds,
            expected=command.expected,
        )
        brought = dict.fromkeys(self._units, Brought(samples=weight_of(self._setup.index)))
        try:
            done = await self._averager.run_round(command.number, call, brought, self._read)
        except RoundFailed as error:
            late = time.time() - command.begin_at
            nothing = dict.fromkeys(PHASES, 0.0) | {"matchmaking": late}
            return Played(seconds=late, whole=False, phases=nothing, reason=str(error))
        return self._played(done, command, time.time() - command.begin_at)

    def compare(self, command: Compare) -> float:
        """The largest difference of a value from the mean in fp64, as a part of the largest value."""
        all_units = [units_of(index, self._setup.parameters) for index in command.indices]
        weights = [weight_of(index) for index in command.indices]
        worst = largest = 0.0
        for unit, tensors in self._last.items():
            for name, tensor in tensors.items():
                mean = merge.weighted_mean([units[unit][name] for units in all_units], weights)
                worst = max(worst, float((tensor - mean).abs().max()))
                largest = max(largest, float(mean.abs().max()))
        return worst / largest

    def _played(self, done: RoundOutcome, command: Play, seconds: float) -> Played:
        self._last = {unit: result.tensors for unit, result in sorted(done.applied.items())}
        vectors = [tensors[name] for tensors in self._last.values() for name in sorted(tensors)]
        return Played(
            phases={name: getattr(done.seconds, name) for name in PHASES} | {"matchmaking": done.seconds.formed},
            seconds=seconds,
            whole=len(done.peers) == command.expected and done.applied.keys() == self._units.keys(),
            met=len(done.peers),
            applied=len(done.applied),
            digest=merge.digest(vectors),
            bytes_sent=done.bytes_sent,
            allreduce_seconds=self._exchange.seconds,
            reason="; ".join(sorted(set(done.kept.values()))),
        )

    async def _read(self) -> Mapping[UnitId, UnitInput]:
        return self._inputs


async def _serve(pipe: Pipe, setup: Setup) -> None:
    network = await HivemindNetwork.start(
        NetworkConfig(host=LOOPBACK, bootstrap=setup.bootstrap),
        run="bench",
        identity_path=setup.directory / f"key-{setup.index}",
    )
    peer = _Peer(pipe, setup, network)
    await peer.start(AveragingConfig(), "bench")
    try:
        pipe.send((await network.addresses())[0])
        with suppress(EOFError):
            while True:
                pipe.send(await _answer(peer, await asyncio.to_thread(pipe.recv)))
    finally:
        await peer.stop()
        await network.stop()


async def _answer(peer: _Peer, command: object) -> object:
    match command:
        case Play():
            return await peer.play(command)
        case Compare():
            return peer.compare(command)
        case UseCodec():
            await peer.use_codec(command)
            return None
    raise TypeError(f"a peer cannot {command!r}")
