"""The exchange between the peers of one run over hivemind: matchmaking, one all-reduce per class, votes."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from hivemind.averaging.group_info import GroupInfo
from hivemind.dht.node import DHTNode
from hivemind.p2p import P2P, PeerID
from hivemind.proto import averaging_pb2
from hivemind.utils.asyncio import as_aiter
from hivemind.utils.timed_storage import get_dht_time

from averaging import planning, signing
from averaging.ballot import Ballot, Word, parse_word, word_of
from averaging.config import MAX_GROUP_PEERS, AveragingConfig
from averaging.errors import BadContribution, RoundFailed
from averaging.exchange import Call, ClassWork, Contribution, Group, Reduced, UnitClass, Vote
from averaging.hivemind_allreduce import ClassRunner, HelpingRunner, Place
from averaging.hivemind_lost import NETWORK_ERRORS
from averaging.hivemind_matchmaking import Joining, find_group
from averaging.hivemind_servicer import AveragingServicer, ServingSeconds
from averaging.registry import Registry
from averaging.shuffle import Shuffle
from peers.identity import verify
from peers.network import PeerId
from peers.streams.send_limit import SendLimit

logger = logging.getLogger(__name__)

_EARLY_SECONDS = 60.0  # how long a faster peer's parts may wait here for this peer to come so far


class HivemindNode(Protocol):
    """What the exchange needs of `peers.hivemind_network.HivemindNetwork`."""

    @property
    def p2p(self) -> P2P:
        """The P2P node."""

    @property
    def dht_node(self) -> DHTNode:
        """The DHT node on the same loop."""

    @property
    def peer_id(self) -> PeerId:
        """Who this node is."""


class HivemindExchange:
    """`averaging.exchange.Exchange` for one run. Call `start` before the first round and `stop` at the end."""

    def __init__(
        self,
        network: HivemindNode,
        identity: signing.Signer,
        run: str,
        config: AveragingConfig,
        limit: SendLimit | None = None,
    ) -> None:
        """`limit` is over all that this peer sends."""
        if not run or "." in run:
            raise ValueError(f"run '{run}' cannot name a namespace; use a name without dots")
        self._network = network
        self._identity = identity
        self._run = run
        self._config, self._limit = config, limit or SendLimit()
        early = min(_EARLY_SECONDS, config.read_seconds + config.reduce_seconds)
        self._runners: Registry[ClassRunner] = Registry(seconds=early)
        self._ballots: Registry[Ballot] = Registry(seconds=early)
        self._servicer = AveragingServicer(
            runners=self._runners,
            ballots=self._ballots,
            check_join=self._check_join,
            seconds=ServingSeconds(drain=config.stall_seconds, vote=config.vote_seconds),
        )
        self._open: dict[bytes, ClassRunner | None] = {}
        self._open_group: bytes | None = None

    async def start(self) -> None:
        """Serve the run's peers from now on."""
        await self._servicer.add_p2p_handlers(self._network.p2p, namespace=self._run)

    async def stop(self) -> None:
        """Serve nobody any more."""
        self._retire()
        try:
            await self._servicer.remove_p2p_handlers(self._network.p2p, namespace=self._run)
        except NETWORK_ERRORS as error:
            logger.debug("handlers were not removed from a p2pd that is gone reason=%r", error)

    async def gather(self, mine: Contribution, call: Call) -> Group | None:
        """One matchmaking; None when no group was found, or the leader's list is not to be trusted."""
        self._retire()
        loop = asyncio.get_running_loop()
        data = await loop.run_in_executor(None, signing.pack, mine, self._run, self._identity)
        joining = Joining(call=call, data=data, client_mode=mine.client_mode)
        found = await find_group(
            self._network.p2p, self._network.dht_node, self._servicer, self._run, self._config, joining
        )
        if found is None:
            return None
        return await loop.run_in_executor(None, self._group, found, data)

    async def reduce(self, group: Group, work: Sequence[ClassWork]) -> Mapping[bytes, Reduced]:
        """All-reduce every class at once. A class without a vector is refused to the others at once, with no wait.

        All classes are registered before the first part goes out, as the others' parts come at any moment.
        """
        if self._open_group != group.group_id:  # else it is a further pass of the same round
            self._retire()
        self._open_group = group.group_id
        results: dict[bytes, Reduced] = {}
        runners: dict[bytes, ClassRunner] = {}
        shuffles: dict[bytes, Shuffle] = {}
        for entry in work:
            key = entry.unit_class.class_id
            self._open[key] = None
            try:
                if self._config.recipe.robust != "none" and entry.vector is not None:
                    shuffles[key] = Shuffle(key, entry.vector.numel())
                runners[key] = self._runner(group, shuffles[key].there(entry) if key in shuffles else entry)
            except RoundFailed as error:
                self._runners.refuse(key, str(error))
                results[key] = Reduced(mean=None, reason=str(error), missing=frozenset({self._network.peer_id}))
        for key, runner in runners.items():
            self._open[key] = runner
            self._runners.put(key, runner)
        async with asyncio.TaskGroup() as tasks:
            running = {key: tasks.create_task(runner.reduce()) for key, runner in runners.items()}
        for key, task in running.items():
            shuffle = shuffles.get(key)
            results[key] = task.result() if shuffle is None else shuffle.back(task.result())
        return results

    async def vote(
        self,
        group: Group,
        classes: Sequence[UnitClass],
        votes: Mapping[bytes, Vote],
        *,
        deadline: float,
    ) -> Mapping[bytes, Mapping[PeerId, Vote]]:
        """Tell the holders of each class this peer's vote, and take theirs until `deadline` (DHT time).

        Members behind NAT are called by nobody: they tell those whom they reach, and hear from these what all others
        say. What this peer is told it hands on as long as its callers stay, also where it only reduces for them.
        """
        loop = asyncio.get_running_loop()
        word = await loop.run_in_executor(None, word_of, group.group_id, votes.values(), self._identity)
        behind_nat = {entry.peer for entry in group.contributions if entry.client_mode}
        ballot = Ballot(group.group_id, classes, [entry.peer for entry in group.contributions], behind_nat)
        ballot.hear(word)
        self._ballots.put(group.group_id, ballot)
        try:
            async with asyncio.timeout(max(0.0, deadline - get_dht_time())), asyncio.TaskGroup() as tasks:
                # Votes are delivered even when the own outcome is clear already: the others wait for them.
                concerned = {peer for entry in classes for peer in entry.reducers}
                for peer in sorted(concerned - behind_nat - {word.peer}):
                    tasks.create_task(self._send_votes(peer, word, ballot if word.peer in behind_nat else None))
                tasks.create_task(ballot.settled())
        except TimeoutError:
            logger.info("votes missing at the deadline run=%s", self._run)
        finally:
            self._close()
        return ballot.votes()

    async def _send_votes(self, peer: PeerId, word: Word, ballot: Ballot | None) -> None:
        """Tell one peer; with a `ballot`, stay for what it hands on of others."""
        stub = AveragingServicer.get_stub(self._network.p2p, PeerID.from_base58(peer), namespace=self._run)
        try:
            stream = await stub.rpc_vote(as_aiter(averaging_pb2.DownloadData(metadata=word.data)))
            try:
                answer = await anext(stream, None)
                if answer is None or answer.code != averaging_pb2.ACCEPTED:
                    logger.info("vote not taken peer=%s", peer)
                elif ballot is not None:
                    await _hear_others(stream, ballot)
            finally:
                await stream.aclose()
        except NETWORK_ERRORS as error:
            logger.info("vote not delivered peer=%s reason=%s", peer, error)

    def _runner(self, group: Group, work: ClassWork) -> ClassRunner:
        unit_class = work.unit_class
        if work.vector is None:
            raise RoundFailed(f"no tensors here for {len(unit_class.units)} units from {unit_class.units[0]}")
        kind = HelpingRunner if self._network.peer_id in unit_class.helpers else ClassRunner
        return kind(
            place=Place(p2p=self._network.p2p, servicer_type=AveragingServicer, namespace=self._run, limit=self._limit),
            work=work,
            peer_fractions=planning.fractions(unit_class.reducers, group.contributions, self._config.recipe.robust),
            config=replace(self._config, part_bytes=planning.part_bytes(group.contributions, self._config)),
        )

    def _close(self) -> None:
        """Free the round's tensors. Late callers are still told that it is over, and late votes still taken."""
        for runner in self._open.values():
            if runner is not None:
                runner.close()

    def _retire(self) -> None:
        """Forget the last round."""
        self._close()
        for key in self._open:
            self._runners.drop(key)
        self._open.clear()
        if self._open_group is not None:
            self._ballots.drop(self._open_group)
            self._open_group = None

    async def _check_join(self, peer: PeerId, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, lambda: signing.parse(data, peer=peer, run=self._run, verify=verify))

    def _group(self, found: GroupInfo, mine: bytes) -> Group | None:
        """Trust nothing of the leader's: each contribution is checked, and the group's id covers all of them."""
        me = self._network.peer_id
        if not len(found.peer_ids) == len(found.gathered) <= MAX_GROUP_PEERS:
            return None
        gathered = {PeerId(peer.to_base58()): data for peer, data in zip(found.peer_ids, found.gathered, strict=True)}
        if gathered.get(me) != mine:
            logger.warning("group refused run=%s reason=the leader changed this peer's contribution", self._run)
            return None
        group_id = hashlib.sha256(b"swarmtune group 1" + found.group_id)
        contributions = []
        for peer in sorted(gathered):
            group_id.update(hashlib.sha256(peer.encode()).digest() + hashlib.sha256(gathered[peer]).digest())
            try:
                contributions.append(signing.parse(gathered[peer], peer=peer, run=self._run, verify=verify))
            except BadContribution as error:
                logger.warning("contribution left out run=%s reason=%s", self._run, error)
        return Group(group_id=group_id.digest(), contributions=tuple(contributions))


async def _hear_others(stream: AsyncIterator[averaging_pb2.AveragingData], ballot: Ballot) -> None:
    """Take what a peer hands on of others, until no vote is missing any more."""
    async with asyncio.TaskGroup() as tasks:
        hearing = tasks.create_task(_hear(stream, ballot))
        await ballot.settled()
        hearing.cancel()


async def _hear(stream: AsyncIterator[averaging_pb2.AveragingData], ballot: Ballot) -> None:
    loop = asyncio.get_running_loop()
    try:
        for _ in range(MAX_GROUP_PEERS):
            answer = await anext(stream, None)
            if answer is None:
                return
            ballot.hear(await loop.run_in_executor(None, parse_word, answer.tensor_part.buffer))
    except BadContribution as error:
        logger.info("a vote that was handed on is refused: %s", error)
    except NETWORK_ERRORS as error:
        logger.info("votes are not handed on any more: %s", error)
