"""One class's all-reduce on hivemind's runner, which sums what the holders have scaled, whole or not at all.

It differs from the stock runner where that one bites: every sender waits on a branch of its own, so that one that dies
cannot cancel the others; the reducer encodes the sum once and everybody decodes the same bytes, so that replicas are
equal to the bit; a claimed weight is ignored; each part's size, dtype and values are checked before they count; and a
missing part fails the class, here and at the others, instead of leaving a mixture.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hivemind.averaging.allreduce import AllReduceRunner
from hivemind.averaging.partition import AllreduceException, TensorPartReducer
from hivemind.p2p import P2P, P2PContext, P2PDaemonError, P2PHandlerError, PeerID
from hivemind.proto import averaging_pb2
from hivemind.utils.asyncio import aiter_with_timeout, amap_in_executor

from averaging import merge
from averaging.config import AveragingConfig
from averaging.exchange import Reduced, UnitClass
from averaging.hivemind_reducer import PartCodec, SumReducer
from peers.network import PeerId

logger = logging.getLogger(__name__)

FRAME_BYTES = 9  # hivemind puts a marker and an 8-byte length before every message
NETWORK_ERRORS = (P2PDaemonError, P2PHandlerError, OSError, EOFError, AllreduceException)
_PARTS_PER_REDUCER = 4  # enough that sending, summing and answering overlap in small classes too
_MIN_PART_BYTES = 2**14
_TELL_SECONDS = 1.0  # to say who is to blame, once a class has failed


class LostPeer(AllreduceException):  # type: ignore[misc]
    """A class cannot be completed because of `peer`."""

    def __init__(self, peer: PeerID, reason: str) -> None:
        super().__init__(f"{peer.to_base58()} {reason}")
        self.peer = peer


class StreamEnded(AllreduceException):  # type: ignore[misc]
    """A stream ended too early, which alone does not say who broke the class."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a run's calls are made and served: the node, the class that registered them, and the run's namespace."""

    p2p: P2P
    servicer_type: type
    namespace: str


class _Wire:
    """What one class's messages carry: checked, decoded and counted, those sent as well as those received."""

    def __init__(self, codec: PartCodec, holders: Sequence[PeerID]) -> None:
        self.bytes_sent = self.bytes_received = 0
        self._codec, self._holders = codec, holders

    def sent(self, message: averaging_pb2.AveragingData) -> averaging_pb2.AveragingData:
        """Count `message`, and hand it on."""
        self.bytes_sent += message.ByteSize() + FRAME_BYTES
        return message

    async def numbered(
        self, stream: AsyncIterator[averaging_pb2.AveragingData], shapes: Sequence[torch.Size]
    ) -> AsyncIterator[tuple[averaging_pb2.AveragingData, torch.Size]]:
        """Each message with the shape that it must have; what is no part of this class raises."""
        part_index = 0
        async for message in stream:
            self.bytes_received += message.ByteSize() + FRAME_BYTES
            if message.code == averaging_pb2.CANCELLED and message.peer_id:
                culprit = PeerID(message.peer_id)
                if culprit in self._holders:
                    raise LostPeer(culprit, "was lost by another holder")
            if not message.HasField("tensor_part"):
                raise AllreduceException(f"sent code {message.code} in place of a part")
            if part_index >= len(shapes):
                raise AllreduceException(f"sent more than {len(shapes)} parts")
            yield message, shapes[part_index]
            part_index += 1

    def decoded(self, numbered: tuple[averaging_pb2.AveragingData, torch.Size]) -> torch.Tensor:
        """The piece in a message of `numbered`."""
        message, shape = numbered
        return self._codec.decode(message.tensor_part, shape)


class _Senders:
    """Who is still owed sums here, and how many are being answered: two events say when there is none."""

    def __init__(self, owed: Iterable[PeerID]) -> None:
        self._owed, self._answering = set(owed), 0
        self.all_served, self.none_answered = asyncio.Event(), asyncio.Event()
        self.none_answered.set()
        if not self._owed:
            self.all_served.set()

    def owes(self, peer: PeerID) -> bool:
        """Whether `peer` has not had all its sums."""
        return peer in self._owed

    def serve(self, peer: PeerID) -> None:
        """Nothing more is owed to `peer`."""
        self._owed.discard(peer)
        if not self._owed:
            self.all_served.set()

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """While one of them is answered."""
        self._answering += 1
        self.none_answered.clear()
        try:
            yield
        finally:
            self._answering -= 1
            if not self._answering:
                self.none_answered.set()


class ClassRunner(AllReduceRunner):  # type: ignore[misc]
    """The all-reduce of one class among exactly its holders. `vector` is fp32, flat, scaled by this peer's share."""

    def __init__(
        self,
        *,
        place: Place,
        unit_class: UnitClass,
        peer_fractions: tuple[float, ...],
        vector: torch.Tensor,
        config: AveragingConfig,
    ) -> None:
        self._codec = PartCodec()
        num_reducers = sum(fraction > 0 for fraction in peer_fractions)
        super().__init__(
            p2p=place.p2p,
            servicer_type=place.servicer_type,
            prefix=place.namespace,
            group_id=unit_class.class_id,
            tensors=(vector,),
            weight=1.0,
            ordered_peer_ids=tuple(PeerID.from_base58(peer) for peer in unit_class.holders),
            peer_fractions=peer_fractions,
            sender_timeout=config.stall_seconds,
            reducer_timeout=2 * config.stall_seconds,
            compression=self._codec.compression,
            part_size_bytes=part_bytes(vector.numel() * vector.element_size(), num_reducers, config.part_bytes),
        )
        stock: TensorPartReducer = self.__dict__.pop("tensor_part_reducer")
        stock.finished.set()  # retired, or its finalizer would warn of parts that it never got
        shapes = tuple(part.shape for part in self.parts_for_local_averaging)
        self.tensor_part_reducer: SumReducer = SumReducer(
            shapes, len(self.sender_peer_ids), codec=self._codec, combine=merge.total
        )
        self._shapes_by_peer = [
            [part.shape for part, _ in parts] for parts in self.tensor_part_container._input_parts_by_peer
        ]
        self._seconds, self._stall_seconds = config.reduce_seconds, config.stall_seconds
        self._senders = _Senders(set(self.sender_peer_ids) - {self.peer_id} if shapes else ())
        self._wire = _Wire(self._codec, self.ordered_peer_ids)

    async def reduce(self) -> Reduced:
        """Run to the end: the whole result, or none and why. Returns once the others have been served too."""
        try:
            async with asyncio.timeout(self._seconds):
                tensors = await self._collect()
                digest = await asyncio.get_running_loop().run_in_executor(None, merge.digest, tensors)
        except TimeoutError:
            silent = set(self.sender_peer_ids) - self.active_senders
            failed = self._failed(f"not done within {self._seconds:g} s{_nothing_from(silent)}", silent)
        except BaseExceptionGroup as group:
            known, bugs = group.split((*NETWORK_ERRORS, LostPeer))
            if bugs is not None or known is None:
                raise
            failed = self._failed(*_blame(_leaves(known)))
        else:
            # Who does not fetch its result will not vote for it either.
            await _wait(self._senders.all_served, self._stall_seconds)
            sent, received = self._wire.bytes_sent, self._wire.bytes_received
            return Reduced(tensors=tensors, digest=digest, bytes_sent=sent, bytes_received=received)
        # Those who wait for sums here are told who is to blame: a stream that just ends would blame this peer.
        await _wait(self._senders.none_answered, _TELL_SECONDS)
        return failed

    def close(self) -> None:
        """Let go of all parts; who still asks is sent away."""
        self.tensor_part_reducer.fail(LostPeer(self.peer_id, "has ended the round"))
        self.finalize(cancel=True)

    async def rpc_aggregate_part(
        self, stream: AsyncIterator[averaging_pb2.AveragingData], context: P2PContext
    ) -> AsyncIterator[averaging_pb2.AveragingData]:
        """Sum one sender's pieces with the others', and answer each with the sum."""
        sender = context.remote_id
        if not self._senders.owes(sender) or sender in self.active_senders:
            yield averaging_pb2.AveragingData(code=averaging_pb2.PROTOCOL_VIOLATION)
            return
        self.active_senders.add(sender)
        with self._senders.answering():
            try:
                async for message in self._answers(stream, self.sender_peer_ids.index(sender)):
                    yield self._wire.sent(message)
            except NETWORK_ERRORS as error:
                failure = await self._judge(sender, error)
                yield averaging_pb2.AveragingData(code=averaging_pb2.CANCELLED, peer_id=failure.peer.to_bytes())
            except BaseException:  # the stream's end cancels this handler: let it go on, and tell the others later
                if self._senders.owes(sender):
                    self._senders.serve(sender)
                    asyncio.get_running_loop().call_later(_TELL_SECONDS, self._lose, sender, "is gone")
                raise

    async def _answers(
        self, stream: AsyncIterator[averaging_pb2.AveragingData], sender_index: int
    ) -> AsyncIterator[averaging_pb2.AveragingData]:
        numbered = self._wire.numbered(aiter_with_timeout(stream, self.sender_timeout), self._my_shapes())
        part_index, num_parts = 0, self.tensor_part_reducer.num_parts
        async with contextlib.aclosing(amap_in_executor(self._wire.decoded, numbered, max_prefetch=1)) as pieces:
            async for piece in pieces:
                summed = await self.tensor_part_reducer.accumulate_part(sender_index, part_index, piece)
                part_index += 1
                if part_index == num_parts:
                    self._senders.serve(self.sender_peer_ids[sender_index])
                yield summed.message
                if part_index == num_parts:
                    return  # and do not wait for the stream's end, which may come late
        raise StreamEnded(f"sent {part_index} of {num_parts} parts")

    async def _collect(self) -> tuple[torch.Tensor, ...]:
        async with asyncio.TaskGroup() as tasks:
            for peer, parts in zip(self.ordered_peer_ids, self.tensor_part_container.num_parts_by_peer, strict=True):
                if parts:
                    tasks.create_task(self._communicate_with_peer(peer))
        return tuple([tensor async for tensor in self.tensor_part_container.iterate_output_tensors()])

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
            raise await self._judge(peer_id, error) from error

    async def _sum_own_share(self) -> None:
        index = self.ordered_peer_ids.index(self.peer_id)
        sender_index = self.sender_peer_ids.index(self.peer_id)
        for part_index, piece in enumerate(self.parts_for_local_averaging):
            summed = await self.tensor_part_reducer.accumulate_part(sender_index, part_index, piece)
            self.tensor_part_container.register_processed_part(index, part_index, summed.tensor)

    async def _sum_at(self, peer_id: PeerID) -> None:
        index = self.ordered_peer_ids.index(peer_id)
        shapes = self._shapes_by_peer[index]
        stream = await self._get_peer_stub(peer_id).rpc_aggregate_part(self._generate_input_for_peer(index))
        part_index = 0
        numbered = self._wire.numbered(stream, shapes)
        try:
            async with contextlib.aclosing(amap_in_executor(self._wire.decoded, numbered, max_prefetch=1)) as sums:
                async for tensor in sums:
                    self.tensor_part_container.register_processed_part(index, part_index, tensor)
                    part_index += 1
                    if part_index == len(shapes):
                        return
        finally:
            with contextlib.suppress(RuntimeError):  # it may be running still, in the task that was just cancelled
                await stream.aclose()
        raise StreamEnded(f"answered {part_index} of {len(shapes)} parts")

    async def _generate_input_for_peer(self, peer_index: int) -> AsyncIterator[averaging_pb2.AveragingData]:
        first: dict[str, Any] = {"code": averaging_pb2.PART_FOR_AVERAGING, "group_id": self.group_id}
        async for part in self.tensor_part_container.iterate_input_parts_for(peer_index):
            message = averaging_pb2.AveragingData(tensor_part=part, weight=1.0, **first)
            first = {}
            yield self._wire.sent(message)

    def _my_shapes(self) -> Sequence[torch.Size]:
        return self._shapes_by_peer[self.ordered_peer_ids.index(self.peer_id)]

    async def _judge(self, peer: PeerID, error: Exception) -> LostPeer:
        """Who is to blame for `error` on the stream with `peer`: itself, unless its stream just ended.

        A peer says who broke the class before it ends its streams, so others are heard first.
        """
        if isinstance(error, LostPeer):
            return error
        if isinstance(error, StreamEnded) or not isinstance(error, AllreduceException):
            await _wait(self.tensor_part_reducer.failed, _TELL_SECONDS)
            if isinstance(self.tensor_part_reducer.failure, LostPeer):
                return self.tensor_part_reducer.failure
        return self._lose(peer, str(error) or type(error).__name__)

    def _lose(self, peer: PeerID, reason: str) -> LostPeer:
        """A holder cannot finish: the class is over for all who still wait for a sum here."""
        failure = LostPeer(peer, reason)
        self.banned_senders.add(peer)
        self.tensor_part_reducer.fail(failure)
        self._senders.serve(peer)
        return failure

    def _failed(self, reason: str, missing: set[PeerID]) -> Reduced:
        # Names a culprit, or the handlers would blame those whom they serve.
        culprit = next(iter(missing), self.peer_id)
        self.tensor_part_reducer.fail(LostPeer(culprit, f"ended the class: {reason}"))
        return Reduced(
            tensors=None,
            reason=reason,
            bytes_sent=self._wire.bytes_sent,
            bytes_received=self._wire.bytes_received,
            missing=frozenset(PeerId(peer.to_base58()) for peer in missing),
        )


async def _wait(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


def _blame(errors: Sequence[BaseException]) -> tuple[str, set[PeerID]]:
    """Why a class failed, and by whom: each lost peer with the first that was said of it."""
    reasons: dict[PeerID, str] = {}
    for error in errors:
        if isinstance(error, LostPeer):
            reasons.setdefault(error.peer, str(error))
    return "; ".join(reasons.values()) or str(errors[0]), set(reasons)


def _nothing_from(silent: set[PeerID]) -> str:
    names = ", ".join(sorted(peer.to_base58() for peer in silent))
    return f"; nothing came from {names}" if names else ""


def part_bytes(class_bytes: int, num_reducers: int, max_bytes: int) -> int:
    """How large the parts of a class are: small classes in several parts too, so that the stages overlap."""
    return min(max_bytes, max(_MIN_PART_BYTES, class_bytes // max(1, num_reducers * _PARTS_PER_REDUCER)))


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found.extend(_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return found
