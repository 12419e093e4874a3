"""Training and generating as whole jobs of a node: load the client's ends of the model, run, report."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch

from blocks.checks import check_kind, check_whole, refuse
from blocks.client import ClientModel
from blocks.load import load_client, load_tokenizer
from blocks.shared_client import SharedClient
from blocks.weights_mark import OUTSIDE
from blocks.worker import ComputeThread, Priority
from peers.chains.decode_legs import SessionConfig
from peers.chains.train_chain import ChainConfig, TrainChain
from peers.network import PeerId
from peers.private.membership import Role
from peers.streams.wire_format import WireFormat
from swarm.data.stream import SampleSet
from swarm.devices import pick_dtype
from swarm.errors import BadConfig, NotInvited
from swarm.exporting import export
from swarm.model import RemoteBlocks, SwarmModel
from swarm.reports.metrics import Value
from swarm.run_model import check_weights, find_run_model
from swarm.training.best_adapter import BEST, BestAdapter
from swarm.training.evaluating import HeldOut
from swarm.training.evaluation_sums import Evaluation
from swarm.training.missing import missing_steps, samples_done
from swarm.training.trainer import STATE_NAME, Head, Progress, SwarmView, Trainer, TrainerConfig
from swarm.training.validation import Validation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peers.published.catalogue import Published
    from swarm.node import Node
    from swarm.peer_config import PeerConfig

T = TypeVar("T")

TOKEN_BUDGET = 2048
_ROUND_SECONDS = 60.0
_POLL_SECONDS = 0.25
_LAST_SUMS_SECONDS = 30.0  # how long the others' last sums are waited for
_CHECK_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRequest:
    """What a trainer was asked to do; see Peer.train. `steps` 0 is what is missing to the run's total. `last_round` is
    waited for before the last evaluation.

    Raises:
        BadConfig: a value is of the wrong kind or out of range; the message names it.
    """

    data: SampleSet
    steps: int = 0
    held_out: SampleSet | None = None
    on_progress: Callable[[Progress], None] | None = None
    last_round: int = 0

    def __post_init__(self) -> None:
        check_whole(BadConfig, "steps", self.steps, 0)
        check_whole(BadConfig, "last_round", self.last_round, 0)
        check_kind(BadConfig, "held_out", self.held_out, (SampleSet, type(None)), "what peer.load(data) returns")
        if self.on_progress is not None and not callable(self.on_progress):
            refuse(BadConfig, "on_progress", self.on_progress, "a function that takes a Progress")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingResult:
    """What a trainer did: the mean token loss of each step (none where the run lacked nothing of its total), what its
    held-out rows gave and those of all trainers, tokens seen, microbatches repeated.
    """

    losses: tuple[float, ...]
    evaluations: tuple[Evaluation, ...]
    swarm_evaluations: tuple[Evaluation, ...]
    tokens: int
    repeated: int


async def train(node: Node, config: PeerConfig, request: TrainingRequest) -> TrainingResult:
    """See Peer.train."""
    return await while_well(node, _train(node, config, request))


async def _train(node: Node, config: PeerConfig, request: TrainingRequest) -> TrainingResult:
    spec, gate = node.spec, node.network.gate
    if gate is not None and not gate.own.role.covers(Role.TRAINER):
        raise NotInvited(f"this peer was invited as a {gate.own.role}; ask the run's owner for one with --role trainer")
    async with _compute(node, config) as thread:
        source = await asyncio.to_thread(find_run_model, spec, config.model, config.cache_dir)
        await asyncio.to_thread(check_weights, source, spec, [OUTSIDE])
        client = await thread.run(
            Priority.FORWARD, lambda: load_client(source, dtype=torch.float32, device=torch.device("cpu"))
        )
        chain_config = ChainConfig(call_seconds=config.call_seconds, wire=config.wire or WireFormat(spec.wire.dtype))
        chain = TrainChain(node.pool, node.routes(), spec.model.num_blocks, chain_config)
        steps = request.steps or await _missing(node)
        settings = TrainerConfig(
            batch_size=spec.training.batch_size,
            steps=steps,
            seed=spec.adapter.seed,
            token_budget=TOKEN_BUDGET,
            nickname=config.nickname,
        )
        state = node.config.state / STATE_NAME
        trainer = Trainer(chain, Head(client, thread), swarm_view(node), request.data, settings, state=state)
        validation = None
        if request.held_out is not None:
            held_out = HeldOut(chain, Head(client, thread), request.held_out, settings, node.config.run)
            keeping = BestAdapter(node.config.state / BEST, partial(export, node, config))
            validation = Validation(held_out.measure, swarm_view(node), keeping, node.metrics.note)
            trainer.validation = validation

        def on_progress(progress: Progress) -> None:
            node.metrics.note("step", numbers_of(progress))
            if request.on_progress is not None:
                request.on_progress(progress)

        node.farewells.append(trainer.leave)  # said here at the end; or as the node stops, which is why this ended
        try:
            if steps:
                await trainer.run(on_progress=on_progress)
            if request.last_round:
                await wait_for_round(node, request.last_round, seconds=_ROUND_SECONDS)
            if validation is not None:
                await validation.measure()
                if validation.is_due():  # a round was done meanwhile
                    await validation.measure()
                validation.end()
                await trainer.tell()
                await validation.finish(_LAST_SUMS_SECONDS)
        finally:
            if validation is not None:
                await validation.close()
            await trainer.leave()
            node.farewells.remove(trainer.leave)
    return TrainingResult(
        losses=tuple(trainer.losses),
        evaluations=() if validation is None else tuple(validation.own),
        swarm_evaluations=() if validation is None else tuple(validation.summed),
        tokens=trainer.tokens,
        repeated=chain.repeated,
    )


async def _missing(node: Node) -> int:
    """Batches that take the run to its `total_samples` from where it stands now."""
    training = node.spec.training
    records = await node.directory.find_progress(node.config.run, node.whole)
    done = samples_done(records, len(node.whole))
    return missing_steps(done=done, total=training.total_samples, batch_size=training.batch_size)


def numbers_of(progress: Progress) -> dict[str, Value]:
    """A step in numbers."""
    return {
        "step": progress.step,
        "samples": progress.samples,
        "loss": progress.loss,
        "tokens_per_second": round(progress.tokens_per_second, 1),
        "round": progress.round,
        "peers": progress.peers,
    }


def client_ends(node: Node, config: PeerConfig) -> SharedClient:
    """The client's ends of the run's model, for all texts of this process; loaded when first asked for.

    They compute in what the run's hosts do, as far as this CPU is fast in it; losses are computed in fp32.
    """
    device = torch.device("cpu")
    dtype = pick_dtype("fp32" if node.spec.model.compute_dtype == "fp32" else "auto", "auto", device)

    def load() -> ClientModel:
        source = find_run_model(node.spec, config.model, config.cache_dir)
        check_weights(source, node.spec, [OUTSIDE])
        return load_client(source, dtype=dtype, device=device)

    return SharedClient(load)


def build_model(
    node: Node,
    config: PeerConfig,
    ends: SharedClient,
    loop: asyncio.AbstractEventLoop,
    tokenizer: PreTrainedTokenizerBase | None,
    published: Published | None,
) -> SwarmModel:
    """See Peer.model. Runs in the caller's thread."""
    source = find_run_model(node.spec, config.model, config.cache_dir)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    client = ends.another()
    session = SessionConfig(
        batch=1,
        max_length=source.max_positions,
        wire=config.wire or WireFormat(node.spec.wire.dtype),
        call_seconds=config.call_seconds,
    )
    blocks = RemoteBlocks(node.pool, node.routes(), node.whole, session, loop=loop)
    return SwarmModel(client, tokenizer or load_tokenizer(source), blocks, published)


async def wait_for_round(node: Node, number: int, *, seconds: float) -> bool:
    """Until every block has a holder at round `number` and no live host is behind it; False after `seconds`."""
    try:
        async with asyncio.timeout(seconds):
            while not _stands_at(node, number):
                node.check()
                await asyncio.sleep(_POLL_SECONDS)
                await node.router.refresh()
    except TimeoutError:
        return False
    return True


async def while_well(node: Node, work: Coroutine[object, object, T]) -> T:
    """The result of `work`, unless the node fails meanwhile: then what has ended it, and the work is ended, too."""
    running = asyncio.create_task(work)
    try:
        while not (await asyncio.wait({running}, timeout=_CHECK_SECONDS))[0]:
            node.check()
        return running.result()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def _stands_at(node: Node, number: int) -> bool:
    done = [record.span for record in node.router.records if record.round >= number]
    return _is_settled(node, number) and all(any(block in span for span in done) for block in node.whole.blocks())


def _is_settled(node: Node, number: int) -> bool:
    """Whether no live host is behind a round."""
    return not _late(node, number)


def _late(node: Node, number: int) -> list[PeerId]:
    router = node.router
    return [each.peer for each in router.records if each.round < number and router.health.is_usable(each.peer)]


def swarm_view(node: Node) -> SwarmView:
    """The swarm as the node's router sees it."""

    def newest() -> int:
        return max((record.round for record in node.router.records), default=0)

    async def refresh() -> None:
        await node.router.refresh()
        await node.router.check(_late(node, newest()))  # the record of one that died lives on for a minute

    return SwarmView(
        me=node.network.peer_id,
        run=node.config.run,
        directory=node.directory,
        round=newest,
        is_settled=lambda number: _is_settled(node, number),
        refresh=refresh,
        num_peers=lambda: len(node.router.records),
        dht_time=node.network.dht_time,
    )


@asynccontextmanager
async def _compute(node: Node, config: PeerConfig) -> AsyncIterator[ComputeThread]:
    """The host's compute thread where this peer is a host too, so that torch runs in one; or else one of its own."""
    if node.hosting is not None:
        yield node.hosting.host.thread
        return
    thread = ComputeThread(num_threads=config.num_threads)
    try:
        yield thread
    finally:
        await asyncio.to_thread(thread.close)
