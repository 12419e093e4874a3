"""The calls that a run's peers may make of each other in a round: join a group, sum a part, tell a vote.

One class per process registers them: hivemind caches handlers on the class, so a base class and its subclass must
never both be registered.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import AsyncIterator  # noqa: UP035  hivemind reads this very name from the annotations

from hivemind.averaging.matchmaking import Matchmaking
from hivemind.p2p import P2PContext, ServicerBase
from hivemind.proto import averaging_pb2, runtime_pb2
from hivemind.utils.asyncio import achain, as_aiter

from averaging.ballot import Ballot, Word, parse_word
from averaging.errors import BadContribution, RoundFailed
from averaging.hivemind_allreduce import ClassRunner
from averaging.hivemind_streams import KeptStream
from averaging.part_message import PartMessage
from averaging.registry import Registry
from averaging.signing import MAX_BYTES
from peers.network import PeerId

logger = logging.getLogger(__name__)

CheckJoin = Callable[[PeerId, bytes], Awaitable[None]]
"""Raises BadContribution unless the bytes are a contribution signed by the peer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingSeconds:
    """How long the other side has to take its answers and end its stream, and how long it hears others' votes."""

    drain: float
    vote: float


class AveragingServicer(ServicerBase):  # type: ignore[misc]
    """Serves one run on one P2P node; callers are known by transport identity, never by claim."""

    def __init__(
        self,
        *,
        runners: Registry[ClassRunner],
        ballots: Registry[Ballot],
        check_join: CheckJoin,
        seconds: ServingSeconds,
    ) -> None:
        self._seconds = seconds
        self.matchmaking: Matchmaking | None = None
        self._runners = runners
        self._ballots = ballots
        self._check_join = check_join

    async def rpc_join_group(
        self, request: averaging_pb2.JoinRequest, context: P2PContext
    ) -> AsyncIterator[averaging_pb2.MessageFromLeader]:
        """A peer asks this one to lead it; refused unless it brings a contribution of its own."""
        matchmaking = self.matchmaking
        if matchmaking is None or len(request.gather) > MAX_BYTES:
            yield averaging_pb2.MessageFromLeader(code=averaging_pb2.NOT_LOOKING_FOR_GROUP)
            return
        try:
            await self._check_join(PeerId(context.remote_id.to_base58()), request.gather)
        except BadContribution as error:
            logger.warning("join refused peer=%s reason=%s", context.remote_id.to_base58(), error)
            yield averaging_pb2.MessageFromLeader(code=averaging_pb2.PROTOCOL_VIOLATION)
            return
        async for message in matchmaking.rpc_join_group(request, context):
            yield message

    async def rpc_aggregate_part(
        self, stream: AsyncIterator[PartMessage], context: P2PContext
    ) -> AsyncIterator[PartMessage]:
        """A holder of one of this peer's classes gives its pieces of this peer's share."""
        async with contextlib.aclosing(KeptStream(stream)) as kept:
            try:
                request = await anext(kept)
                runner = await self._runners.get(request.group_id, PeerId(context.remote_id.to_base58()))
            except (StopAsyncIteration, RoundFailed) as error:
                logger.debug("parts refused peer=%s reason=%s", context.remote_id.to_base58(), error)
                yield PartMessage(averaging_pb2.BAD_GROUP_ID)
            else:
                async for message in runner.rpc_aggregate_part(achain(as_aiter(request), kept), context):
                    yield message
            await kept.drain(self._seconds.drain)

    async def rpc_vote(
        self, stream: AsyncIterator[averaging_pb2.DownloadData], context: P2PContext
    ) -> AsyncIterator[averaging_pb2.AveragingData]:
        """A member of this peer's group tells how its classes ended, and hears what others have told, if it stays."""
        peer = PeerId(context.remote_id.to_base58())
        async with contextlib.aclosing(KeptStream(stream)) as kept:
            try:
                word = await self._word((await anext(kept)).metadata, peer)
                ballot = await self._ballots.get(word.group_id, peer)
            except (StopAsyncIteration, RoundFailed, BadContribution) as error:
                logger.debug("vote refused peer=%s reason=%s", peer, error)
                yield averaging_pb2.AveragingData(code=averaging_pb2.BAD_GROUP_ID)
            else:
                ballot.hear(word)
                yield averaging_pb2.AveragingData(code=averaging_pb2.ACCEPTED)
                async for data in ballot.words(peer, self._seconds.vote):
                    yield averaging_pb2.AveragingData(
                        code=averaging_pb2.ACCEPTED, tensor_part=runtime_pb2.Tensor(buffer=data)
                    )
            await kept.drain(self._seconds.drain)

    async def _word(self, data: bytes, peer: PeerId) -> Word:
        word = await asyncio.get_running_loop().run_in_executor(None, parse_word, data)
        if word.peer != peer:
            raise BadContribution(f"votes of {word.peer} come from {peer}")
        return word
