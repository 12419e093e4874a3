"""One class's all-reduce on hivemind's runner, by the shares that all have signed, whole or not at all.

It differs from the stock runner where that one bites: every sender waits on a branch of its own, so that one that dies
cannot cancel the others; the reducer encodes the sum once and everybody decodes the same bytes, so that replicas are
equal to the bit; a claimed weight is ignored; each part's size, dtype and values are checked before they count; and a
missing part fails the class, here and at the others, instead of leaving a mixture.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from hivemind.averaging.allreduce import AllReduceRunner, AveragingMode
from hivemind.averaging.partition import TensorPartReducer
from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.proto import averaging_pb2
from hivemind.utils.asyncio import aiter_with_timeout, amap_in_executor, as_aiter

from averaging import merge
from averaging.codecs import make_codec
from averaging.config import AveragingConfig
from averaging.exchange import ClassWork, Reduced, UnitClass
from averaging.hivemind_judge import TELL_SECONDS, Judge, wait_for
from averaging.hivemind_lost import NETWORK_ERRORS, LostPeer, StreamEnded, blame, leaves, nothing_from
from averaging.hivemind_reducer import PartCodec, SumReducer
from averaging.hivemind_wire import Numbered, Senders, Wire
from averaging.part_message import PartMessage
from averaging.parts import ClassParts, Debts, Stretch, part_bytes, stretches
from peers.network import PeerId
from peers.streams.send_limit import SendLimit

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a run's calls are made and served: the node, the class that registered them, and the run's namespace;
    and how much this peer may send.
    """

    p2p: P2P
    servicer_type: type
    namespace: str
    limit: SendLimit = field(default_factory=SendLimit)


class ClassRunner(AllReduceRunner):  # type: ignore[misc]
    """The all-reduce of one class among exactly its holders, and who helps them. `work.vector` is there."""

    def __init__(
        self, *, place: Place, work: ClassWork, peer_fractions: tuple[float, ...], config: AveragingConfig
    ) -> None:
        if work.vector is None:
            raise ValueError("a class without a vector has no all-reduce; an error of the caller")
        recipe = config.recipe
        self._codec = PartCodec(make_codec(recipe.codec, top_share=recipe.top_share, lossless=recipe.lossless))
        self._debts = Debts(self._codec.codec, work.vector, work.owed_sent, work.owed_sum)
        num_reducers = sum(fraction > 0 for fraction in peer_fractions)
        super().__init__(
            p2p=place.p2p,
            servicer_type=place.servicer_type,
            prefix=place.namespace,
            group_id=work.unit_class.class_id,
            tensors=(self._debts.vector,),
            weight=1.0,
            ordered_peer_ids=tuple(PeerID.from_base58(peer) for peer in work.unit_class.reducers),
            peer_fractions=peer_fractions,
            modes=_modes(work.unit_class, peer_fractions),
            sender_timeout=config.stall_seconds,
            reducer_timeout=2 * config.stall_seconds,
            part_size_bytes=part_bytes(4 * work.vector.numel(), num_reducers, config.part_bytes),
        )
        given = self.tensor_part_container._input_parts_by_peer
        self._parts = ClassParts(
            recipe.robust,
            work.segments,
            self._debts,
            stretches([[part.numel() for part, _ in parts] for parts in given]),
            me=self.ordered_peer_ids.index(self.peer_id),
        )
        stock: TensorPartReducer = self.__dict__.pop("tensor_part_reducer")
        stock.finished.set()  # retired, or its finalizer would warn of parts that it never got
        shapes = tuple(part.shape for part in self.parts_for_local_averaging)
        self._mean = torch.empty_like(self._debts.vector)
        self.tensor_part_reducer: SumReducer = SumReducer(
            shapes,
            len(self.sender_peer_ids),
            codec=self._codec,
            combine=self._parts.combine,
            settle=self._parts.note_summed,
        )
        self._seconds, self._stall_seconds = config.reduce_seconds, config.stall_seconds
        self._senders = Senders(set(self.sender_peer_ids) - {self.peer_id} if shapes else ())
        self._judge = Judge(self.tensor_part_reducer, self._senders)
        self._wire = Wire(self._codec, self.ordered_peer_ids, config.max_update, place.limit)

    async def reduce(self) -> Reduced:
        """Run to the end: the whole result, or none and why. Returns once the others have been served too."""
        try:
            async with asyncio.timeout(self._seconds):
                await self._collect()
                result = await asyncio.get_running_loop().run_in_executor(None, self._result)
        except TimeoutError:
            silent = set(self.sender_peer_ids) - self.active_senders
            failed = self._failed(f"not done within {self._seconds:g} s{nothing_from(silent)}", silent)
        except BaseExceptionGroup as group:
            known, bugs = group.split((*NETWORK_ERRORS, LostPeer))
            if bugs is not None or known is None:
                raise
            failed = self._failed(*blame(leaves(known)))
        else:
            # Who does not fetch its result will not vote for it either.
            await wait_for(self._senders.all_served, self._stall_seconds)
            return replace(result, bytes_sent=self._wire.bytes_sent, bytes_received=self._wire.bytes_received)
        # Those who wait for sums here are told who is to blame: a stream that just ends would blame this peer.
        await wait_for(self._senders.none_answered, TELL_SECONDS)
        return failed

    def close(self) -> None:
        """Let go of all parts; who still asks is sent away."""
        self.tensor_part_reducer.fail(LostPeer(self.peer_id, "has ended the round"))
        self.finalize(cancel=True)

    async def rpc_aggregate_part(
        self, stream: AsyncIterator[PartMessage], context: P2PContext
    ) -> AsyncIterator[PartMessage]:
        """Sum one sender's pieces with the others', and answer each with the sum."""
        sender = context.remote_id
        if not self._senders.owes(sender) or sender in self.active_senders:
            yield PartMessage(averaging_pb2.PROTOCOL_VIOLATION)
            return
        self.active_senders.add(sender)
        with self._senders.answering():
            try:
                async for message in self._answers(stream, self.sender_peer_ids.index(sender)):
                    yield message
            except NETWORK_ERRORS as error:
                failure = await self._judge.judge(sender, error)
                yield PartMessage(averaging_pb2.CANCELLED, culprit=failure.peer.to_bytes())
            except BaseException:  # the stream's end cancels this handler: let it go on, and tell the others later
                if self._senders.owes(sender):
                    self._senders.serve(sender)
                    asyncio.get_running_loop().call_later(TELL_SECONDS, self._judge.lose, sender, "is gone")
                raise

    async def _answers(self, stream: AsyncIterator[PartMessage], sender_index: int) -> AsyncIterator[PartMessage]:
        own = self._parts.by_reducer[self.ordered_peer_ids.index(self.peer_id)]
        numbered = self._wire.numbered(aiter_with_timeout(stream, self.sender_timeout), own)
        part_index, num_parts = 0, self.tensor_part_reducer.num_parts
        async with contextlib.aclosing(amap_in_executor(self._wire.piece, numbered, max_prefetch=1)) as pieces:
            async for piece in pieces:
                summed = await self.tensor_part_reducer.accumulate_part(sender_index, part_index, piece)
                part_index += 1
                if part_index == num_parts:
                    self._senders.serve(self.sender_peer_ids[sender_index])
                yield await self._wire.sent(summed.message)
                if part_index == num_parts:
                    return  # and do not wait for the stream's end, which may come late
        raise StreamEnded(f"sent {part_index} of {num_parts} parts")

    async def _collect(self) -> None:
        """Every reducer's sums into the mean."""
        async with asyncio.TaskGroup() as tasks:
            for peer, parts in zip(self.ordered_peer_ids, self._parts.by_reducer, strict=True):
                if parts:
                    tasks.create_task(self._communicate_with_peer(peer))

    def _result(self) -> Reduced:
        """In a worker thread: what came of it, and who did what cannot be right."""
        return Reduced(
            mean=self._mean,
            digest=merge.digest([self._mean]),
            dropped=_names(self.ordered_peer_ids, self._parts.dropped),
            doubted=_names(self.ordered_peer_ids, self._parts.doubted(self._mean)),
            owed_sent=self._debts.sent,
            owed_sum=self._debts.summed,
        )

    async def _communicate_with_peer(self, peer_id: PeerID) -> None:
        """Give one reducer its pieces of the vector and take the sums.

        Raises:
            LostPeer: it or somebody whom it waits for is gone or sent what cannot be right.
        """
        if peer_id == self.peer_id:
            await self._sum_own_share()
            return
        try:
            await self._sum_at(peer_id)
        except LostPeer:
            raise
        except NETWORK_ERRORS as error:
            raise await self._judge.judge(peer_id, error) from error

    async def _sum_own_share(self) -> None:
        own = self._parts.by_reducer[self.ordered_peer_ids.index(self.peer_id)]
        sender_index = self.sender_peer_ids.index(self.peer_id)
        for part_index, stretch in enumerate(own):
            piece = self._wire.own(stretch.of(self._debts.vector))  # as others judge it, or parts would differ
            summed = await self.tensor_part_reducer.accumulate_part(sender_index, part_index, piece)
            stretch.of(self._mean).copy_(summed.tensor)

    async def _sum_at(self, peer_id: PeerID) -> None:
        index = self.ordered_peer_ids.index(peer_id)
        theirs = self._parts.by_reducer[index]
        stream = await self._get_peer_stub(peer_id).rpc_aggregate_part(self._generate_input_for_peer(index))
        part_index = 0
        numbered = self._wire.numbered(stream, theirs)
        try:
            async with contextlib.aclosing(amap_in_executor(self._take, numbered, max_prefetch=1)) as sums:
                async for _ in sums:
                    part_index += 1
                    if part_index == len(theirs):
                        return
        finally:
            with contextlib.suppress(RuntimeError):  # it may be running still, in the task that was just cancelled
                await stream.aclose()
        raise StreamEnded(f"answered {part_index} of {len(theirs)} parts")

    def _take(self, numbered: Numbered) -> None:
        """In a worker thread: a reducer's sum of one part."""
        numbered[1].of(self._mean).copy_(self._wire.combined(numbered))

    async def _generate_input_for_peer(self, peer_index: int) -> AsyncIterator[PartMessage]:
        mine = as_aiter(*self._parts.by_reducer[peer_index])
        async with contextlib.aclosing(amap_in_executor(self._encoded, mine, max_prefetch=1)) as messages:
            async for message in messages:
                yield await self._wire.sent(message)

    def _encoded(self, stretch: Stretch) -> PartMessage:
        data = self._codec.encode(stretch.of(self._debts.vector))
        self._debts.note_sent(stretch, data)
        return PartMessage.written(averaging_pb2.PART_FOR_AVERAGING, data, group_id=self.group_id)

    def _failed(self, reason: str, missing: set[PeerID]) -> Reduced:
        culprit = next(iter(missing), self.peer_id)  # or the handlers would blame those whom they serve
        self.tensor_part_reducer.fail(LostPeer(culprit, f"ended the class: {reason}"))
        return Reduced(
            mean=None,
            reason=reason,
            bytes_sent=self._wire.bytes_sent,
            bytes_received=self._wire.bytes_received,
            missing=frozenset(PeerId(peer.to_base58()) for peer in missing),
            dropped=_names(self.ordered_peer_ids, self._parts.dropped),
        )


class HelpingRunner(ClassRunner):
    """The same at one that holds nothing of the class, and reduces for holders behind NAT: it only serves."""

    async def _collect(self) -> None:
        """Wait until all holders have had this peer's sums.

        Raises:
            ExceptionGroup: of LostPeer, as where there is something to collect.
        """
        reducer = self.tensor_part_reducer
        async with asyncio.TaskGroup() as tasks:
            ends = [tasks.create_task(event.wait()) for event in (self._senders.all_served, reducer.failed)]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for end in ends:
                end.cancel()
            if reducer.failure is not None:
                raise reducer.failure

    def _result(self) -> Reduced:
        return Reduced(mean=None)


def _modes(unit_class: UnitClass, fractions: Sequence[float]) -> tuple[AveragingMode, ...]:
    """Holders that nobody can dial reduce nothing; helpers do nothing else."""
    num_holders = len(unit_class.holders)
    holders = [AveragingMode.NODE if fraction else AveragingMode.CLIENT for fraction in fractions[:num_holders]]
    return (*holders, *[AveragingMode.AUX] * len(unit_class.helpers))


def _names(holders: Sequence[PeerID], places: Iterable[int]) -> frozenset[PeerId]:
    return frozenset(PeerId(holders[place].to_base58()) for place in places)
