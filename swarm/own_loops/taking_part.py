"""A node that averages what a training loop of its own trains: a holder of all units that serves no blocks."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from averaging.hivemind_exchange import HivemindExchange
from blocks.peft_units import check_base, find_units
from peers.errors import NetworkFailed
from peers.records import MAX_ADDRESSES, PeerRecord, TrainerRecord, seal_record
from peers.streams.messages import PROTOCOL_MAX, PROTOCOL_MIN
from swarm.errors import BadConfig
from swarm.hosts.contributions import Contributions, Given
from swarm.hosts.hosting import round_keeper, save_all, serve_units
from swarm.hosts.loading import run_rules
from swarm.hosts.pausing import LEAVE_SECONDS
from swarm.own_loops.evaluations import OwnEvaluations
from swarm.own_loops.step_gate import StepGate
from swarm.own_loops.units import OwnUnits
from swarm.run_model import find_run_model
from swarm.run_rules import averaging_config
from swarm.training.jobs import swarm_view
from swarm.units.handing_over import HandingOver
from swarm.units.rounds import RoundKeeper

if TYPE_CHECKING:
    from swarm.node import Node

logger = logging.getLogger(__name__)

_LIFE_SECONDS = 60.0
_BETWEEN_SECONDS = 2.0
_ROUND_SECONDS = 5.0  # how long a round that is under way is waited for by who leaves
_LOOK_SECONDS = 1.0
_LATE = "hand"  # one of peers.records.AWAY: nobody waits for a loop that stands still, in a notebook for one


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnModel:
    """A peft model and the gate of the loop that trains it. `local` is a copy of the run's model on this machine."""

    module: nn.Module
    gate: StepGate
    cache_dir: Path
    local: str | None = None
    nickname: str = ""
    keep_bytes: int = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopState:
    """What a loop says of itself: the mean loss per token, held out too, in nats, optimizer steps, tokens a second."""

    loss: float
    step: int
    tokens_per_second: float
    held_out: float | None = None


class TakingPart:
    """The parts of a node that takes part in rounds with a loop's units. Made by `start_taking_part`."""

    def __init__(
        self,
        node: Node,
        parts: tuple[OwnUnits, RoundKeeper, HandingOver, HivemindExchange],
        given: Contributions,
        nickname: str,
    ) -> None:
        self.units, self.keeper, self._handing, self._exchange = parts
        self.sealed = b""
        """This peer's record as it was last announced."""
        self.state: LoopState | None = None
        self.evaluations = OwnEvaluations(swarm_view(node), self.units, node.metrics.note)
        self._node, self._nickname = node, nickname
        self._away = ""
        self._given = given
        given.begin(lambda: Given(trained_tokens=self.units.ledger.trained_tokens))

    @property
    def holder(self) -> OwnUnits:
        """What is held."""
        return self.units

    async def announce(self) -> None:
        """Tell the others that this peer holds units, and that nothing can be routed through it.

        Raises:
            NetworkFailed: it cannot be done.
        """
        node = self._node
        given = await self._given.save()
        record = PeerRecord(
            run=node.config.run,
            peer=node.network.peer_id,
            span=self.units.span,
            tokens_per_second=0.0,
            backward_tokens_per_second=0.0,
            queue_seconds=0.0,
            round=self.units.round,
            cache_free_bytes=0,
            addresses=(await node.network.addresses())[:MAX_ADDRESSES],
            protocol=(PROTOCOL_MIN, PROTOCOL_MAX),
            software=node.hello().software,
            dtype="float32",
            nickname=self._nickname,
            roles=("trainer",),
            away=self._away,
            pinned=True,
            trained_tokens=given.trained_tokens,
            served_tokens=given.served_tokens,
            expires_at=node.network.dht_time() + _LIFE_SECONDS,
        )
        self.sealed = seal_record(node.network.identity, record)
        await node.directory.publish(record)

    async def tell(self) -> None:
        """Keep both records in the directory, until cancelled."""
        told_at, told_round = self._node.network.dht_time(), self.units.round
        told: tuple[LoopState | None, int | None] = self.state, None
        while True:
            await asyncio.sleep(_BETWEEN_SECONDS)
            now = self._node.network.dht_time()
            if self.units.round != told_round or abs(now - told_at) > _LIFE_SECONDS / 2:
                told_at, told_round = now, self.units.round
                await self.announce()
            news = self.state, self.evaluations.announced
            if self.state is not None and news != told:
                told = news
                await self._tell_state(self.state, now)

    async def watch(self) -> None:
        """Stay out of rounds while the loop does not come to its boundaries, until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            late = self.units.gate.is_late()
            if late and not self.keeper.is_away:
                async with self.keeper.turn:
                    await self.keeper.tell_away(_LATE)
                logger.info("out of rounds until the training loop makes a step again")
            elif not late and self.keeper.is_away and not self._away:
                async with self.keeper.turn:
                    await self.keeper.catch_up()
                    await self.keeper.tell_away("")
                logger.info("in rounds again round=%d", self.units.round)

    async def leave(self) -> None:
        """Say that this peer goes, after the round that is under way. Everything must be running still."""
        self._away = "leaving"
        try:
            async with asyncio.timeout(LEAVE_SECONDS):
                try:
                    async with asyncio.timeout(_ROUND_SECONDS), self.keeper.turn:
                        await self.keeper.tell_away("leaving")
                except TimeoutError:
                    logger.warning("left in the middle of a round, after %.0f s", _ROUND_SECONDS)
                    await self.keeper.tell_away("leaving")
                await self.announce()
                if self.state is not None:
                    await self._tell_state(self.state, self._node.network.dht_time())
        except NetworkFailed as error:
            logger.info("left without a word: %s", error)  # p2pd is gone; the records expire by themselves
        except TimeoutError:
            logger.warning("left after %.0f s without telling everybody", LEAVE_SECONDS)

    async def stop(self) -> None:
        """Keep what was learnt, here and with keepers."""
        try:
            await save_all(self.units, self.keeper, self._handing)
            await self._given.save()
        finally:
            await self.evaluations.close()
            await self._exchange.stop()

    async def _tell_state(self, state: LoopState, now: float) -> None:
        node = self._node
        await node.directory.publish(
            TrainerRecord(
                run=node.config.run,
                peer=node.network.peer_id,
                nickname=self._nickname,
                loss=state.loss,
                eval_loss=state.held_out,
                tokens_per_second=state.tokens_per_second,
                step=state.step,
                round=self.units.round,
                evaluated=None if self._away else self.evaluations.announced,
                left=bool(self._away),
                expires_at=now + _LIFE_SECONDS,
            )
        )


async def start_taking_part(node: Node, own: OwnModel) -> TakingPart:
    """Find the run's units in the model, put the newest state into them, and come to the run's rounds from now on.

    Raises:
        BlockError: the model has not the run's LoRA, or is another model.
        SwarmError: the state directory or the model belongs to something else, or this peer holds blocks.
        NetworkFailed: the others cannot be told.
    """
    if node.hosting is not None or node.taking_part is not None:
        raise BadConfig("this peer holds the run's units already; start another peer for this training loop")
    source = await asyncio.to_thread(find_run_model, node.spec, own.local, own.cache_dir)
    rules = await run_rules(node, source)
    parameters = await asyncio.to_thread(find_units, own.module, rules.lora, source)
    await asyncio.to_thread(check_base, own.module, source)
    units = OwnUnits(parameters, node.whole, rules, own.gate, node.config.state, keep_bytes=own.keep_bytes)
    network = node.network
    async with AsyncExitStack() as undo:
        await units.begin()
        limit = node.traffic.limit
        exchange = HivemindExchange(network, network.identity, node.config.run, averaging_config(node.spec), limit)
        await exchange.start()
        undo.push_async_callback(exchange.stop)
        keeper = round_keeper(node, units, exchange)
        await keeper.catch_up(is_start=True)
        handing, safe = await serve_units(node, units, keeper)
        given = await asyncio.to_thread(Contributions, node.config.state, network.peer_id)
        part = TakingPart(node, (units, keeper, handing, exchange), given, own.nickname)
        await part.announce()
        undo.pop_all()
    logger.info("taking part round=%d units=%d", units.round, len(units.units))
    works = {
        "rounds": keeper.run(),
        "units for keepers": handing.run(),
        "room for others' units": safe.run(),
        "what is told of the loop": part.tell(),
        "held-out sums of the loop": part.evaluations.run(),
        "steps of the loop": part.watch(),
    }
    for name, work in works.items():
        node.spawn(work, name)
    return part
