"""Microbatches through several hosts and back: counted once for each block, whoever dies."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest
import torch

from blocks.snapshots import Snapshot, SnapshotShelf
from blocks.spans import Span
from blocks.training.ledger import Ledger, MicrobatchId, Piece
from blocks.training.span_trainer import Microbatch
from peers.chains.edge import Edge
from peers.chains.train_chain import ChainConfig, HeadResult, TrainChain, Work
from peers.chains.train_service import TrainService
from peers.errors import NoRoute, Refused
from peers.info_service import InfoService
from peers.network import PeerId
from peers.routes.routing import Hop
from peers.streams.answering import CallServer
from peers.streams.messages import RefusalCode
from peers.streams.pool import Pool
from peers.streams.traffic import Traffic
from peers.streams.wire_format import WireFormat
from tests.fakes_network import FakeSwarm, fake_swarm
from tests.unit.peers.chain_swarm import HELLO, KnownRouter

HOSTS = {
    "a": Span(0, 2), "b": Span(2, 4), "c": Span(4, 6),
    "a2": Span(0, 2), "b2": Span(2, 4), "c2": Span(4, 6),
}  # fmt: skip
HIDDEN_BTD = torch.ones(2, 3, 8)
MASK_BT = torch.ones(2, 3, dtype=torch.int64)
Strike = Callable[[str, str], None]


class AddingTrainer:
    """A SpanTrainer's books; forward adds one to activations for each block, backward doubles gradients."""

    def __init__(self, name: str, span: Span, strike: Strike) -> None:
        self.ledger = Ledger(span, batch_size=1000)
        self._name, self._strike = name, strike

    async def forward(self, one: Microbatch) -> torch.Tensor:
        self._strike(self._name, "forward")
        await asyncio.sleep(0)  # where one that was struck ends
        self.ledger.open(one.piece, samples=one.samples, deadline=1.0)
        return one.hidden_BTD + len(one.span)

    async def backward(self, piece: Piece, grad: torch.Tensor, *, tokens: int) -> torch.Tensor:
        self._strike(self._name, "backward")
        await asyncio.sleep(0)
        if not self.ledger.is_open(piece):
            raise Refused("no such microbatch is open here", RefusalCode.SESSION)
        self.ledger.answer(piece, tokens=tokens, deadline=1.0)
        return grad * 2

    async def commit(self, piece: Piece) -> None:
        self._strike(self._name, "commit")
        await asyncio.sleep(0)
        if self.ledger.is_pending(piece):
            self.ledger.commit(piece)
        elif not self.ledger.is_counted(piece):
            raise Refused("no such microbatch is pending here", RefusalCode.SESSION)

    def drop(self, microbatch: MicrobatchId) -> None:
        for piece in self.ledger.pieces_of(microbatch):
            self.ledger.drop(piece)

    async def evaluate(self, hidden: torch.Tensor, mask: object, span: Span, label: str) -> torch.Tensor:
        self._strike(self._name, "evaluate")
        await asyncio.sleep(0)
        return hidden + len(span)


@dataclass
class Training:
    """Hosts, a trainer's chain over them, and when which host is to die."""

    network: FakeSwarm
    router: KnownRouter
    traffic: Traffic
    trainers: dict[str, AddingTrainer] = field(default_factory=dict)
    pools: list[Pool] = field(default_factory=list)
    chain: TrainChain | None = None
    deaths: set[tuple[str, str]] = field(default_factory=set)
    numbers: itertools.count[int] = field(default_factory=itertools.count)

    def strike(self, name: str, moment: str) -> None:
        if (name, moment) in self.deaths:
            self.deaths.remove((name, moment))
            self.network.kill(name)

    async def add(self, name: str, span: Span) -> None:
        network, traffic = self.network.join(name), Traffic()
        trainer = self.trainers[name] = AddingTrainer(name, span, self.strike)
        shelf = SnapshotShelf()
        shelf.add(Snapshot(label="s", round=1, digests={}))
        pool = Pool(network, HELLO, traffic, {})
        self.pools.append(pool)
        service = TrainService(trainer, shelf, Edge(hidden_size=8, max_positions=16), pool)  # type: ignore[arg-type]
        await network.serve_stream("train", CallServer(HELLO, service, traffic).serve)
        await network.serve_stream("info", CallServer(HELLO, InfoService(lambda: b"", traffic), traffic).serve)

    async def one(self) -> HeadResult:
        """The next microbatch, all the way; the activations that come out are checked."""
        assert self.chain is not None
        work = Work(id=MicrobatchId("ann", 1, next(self.numbers), 0), hidden_BTD=HIDDEN_BTD, mask_BT=MASK_BT)

        async def head(hidden: torch.Tensor) -> HeadResult:
            assert torch.equal(hidden, HIDDEN_BTD + 6)
            return HeadResult(loss=1.0, grad_BTD=torch.ones_like(hidden), tokens=6)

        return await self.chain.train(work, head)

    def sent(self, peer: str, kind: str) -> bool:
        return kind in self.traffic.by_peer.get(PeerId(peer), {})

    def counted(self, block: int) -> int:
        """Samples that all hosts together, dead ones too, have counted for a block."""
        return sum(t.ledger.tallies[block].samples for t in self.trainers.values() if block in t.ledger.span)


@pytest.fixture
async def training() -> AsyncIterator[Training]:
    async with fake_swarm() as network:
        made = Training(network=network, router=KnownRouter(HOSTS), traffic=Traffic())
        for name, span in HOSTS.items():
            await made.add(name, span)
        pool = Pool(network.join("ann"), HELLO, made.traffic, {})
        made.pools.append(pool)
        config = ChainConfig(call_seconds=30.0, wire=WireFormat.FP32)
        made.chain = TrainChain(pool, made.router, 6, config)
        yield made
        for each in made.pools:
            await each.close()


async def test_activations_and_gradients_go_from_host_to_host(training: Training) -> None:
    for _ in range(3):
        await training.one()
    assert [training.counted(block) for block in range(6)] == [6] * 6
    assert [training.sent(peer, "forward") for peer in "abc"] == [True, False, False]
    assert [training.sent(peer, "backward") for peer in "abc"] == [False, False, True]
    assert [training.sent(peer, "collect") for peer in "abc"] == [False, False, True]
    assert training.chain is not None
    assert training.chain.repeated == 0
    assert not any(trainer.ledger.pieces() for trainer in training.trainers.values())


@pytest.mark.parametrize("moment", ["forward", "backward", "commit"])
@pytest.mark.parametrize("victims", ["a", "b", "c", "ac", "abc"])
async def test_a_microbatch_is_counted_once_for_each_block_whoever_dies(
    training: Training, victims: str, moment: str
) -> None:
    await training.one()
    training.deaths = {(victim, moment) for victim in victims}
    await training.one()
    await training.one()
    assert not training.deaths
    assert [training.counted(block) for block in range(6)] == [6] * 6
    assert training.chain is not None
    assert training.chain.repeated >= 1


async def test_an_evaluation_goes_on_over_others(training: Training) -> None:
    assert training.chain is not None
    training.deaths = {("b", "evaluate")}
    output = await training.chain.evaluate(HIDDEN_BTD, None)
    assert torch.equal(output, HIDDEN_BTD + 6)


async def test_lanes_that_a_host_has_forgotten_are_opened_again_at_the_same_host(training: Training) -> None:
    await training.one()
    for pool in training.pools[:-1]:
        await pool.close()  # neighbours dial again, and nothing is lost
    await training.one()
    await training.pools[-1].close()  # the trainer's streams, and with them its lanes
    await training.one()
    assert [training.counted(block) for block in range(6)] == [6] * 6
    assert not training.router.out
    assert all(training.trainers[name].ledger.tallies[HOSTS[name].start].samples == 6 for name in "abc")


async def test_many_microbatches_at_once_all_count(training: Training) -> None:
    training.deaths = {("b", "backward"), ("a2", "forward")}
    await asyncio.gather(*(training.one() for _ in range(8)))
    assert [training.counted(block) for block in (0, 4)] == [16, 16]
    assert training.counted(2) == 16


async def test_blocks_that_nobody_holds_any_more_end_the_work_and_leave_nothing_open(training: Training) -> None:
    training.network.kill("b2")
    training.deaths = {("b", "forward")}
    with pytest.raises(NoRoute, match="2:4"):
        await training.one()
    assert not training.trainers["a"].ledger.pieces()


async def test_while_nobody_holds_some_blocks_the_other_hosts_keep_no_microbatch_open_and_count_it_once(
    training: Training,
) -> None:
    training.network.kill("b2")
    training.deaths = {("b", "forward")}
    router, waited = training.router, asyncio.Event()
    gap = asyncio.Event()

    async def spread(span: Span, num_tokens: int) -> tuple[Hop, ...]:
        if "b" in router.out and not gap.is_set():
            waited.set()
            await gap.wait()
        return await router.fast(span, avoid=frozenset({PeerId("b2")}))

    router.spread = spread  # type: ignore[method-assign]
    work = asyncio.create_task(training.one())
    async with asyncio.timeout(20):
        await waited.wait()
        assert training.trainers["a"].ledger.pieces()
        while training.trainers["a"].ledger.pieces():  # noqa: ASYNC110 - the ledger tells nobody
            await asyncio.sleep(0.05)
        await training.add("b3", Span(2, 4))
        router.hosts["b3"] = Span(2, 4)
        gap.set()
        await work
    assert [training.counted(block) for block in range(6)] == [2] * 6
    assert training.trainers["a"].ledger.tallies[0].samples == 2, "the same host goes on"
