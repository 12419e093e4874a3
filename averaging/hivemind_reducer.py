"""The parts of an all-reduce: checked on the way in, combined once all are there, encoded once for everybody."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from hivemind.averaging.partition import AllreduceException, TensorPartReducer
from hivemind.proto import averaging_pb2

from averaging.codecs import Buffer, Codec
from averaging.errors import BadTensors
from averaging.part_message import PartMessage

Piece = torch.Tensor | None
"""What one sender gave for one part; None where its values can be no update."""

Combine = Callable[[int, Sequence[Piece]], torch.Tensor]
"""The combination of all senders' pieces of one part, by the part's number here."""

Settle = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Told of each part's exact combination, and of what everybody decodes for it."""


class PartCodec:
    """A part's bytes and back, in the run's codec. What comes from others is checked before it is decoded."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def encode(self, values: torch.Tensor) -> bytes:
        """A part, or a sum, as all who get it will read it.

        Raises:
            BadTensors: values that are not finite.
        """
        return self.codec.encode(values)

    def check_size(self, values: Buffer, num_values: int) -> None:
        """Refuse the bytes of a part that a peer sent, before anything is made of them.

        Raises:
            AllreduceException: more bytes than the codec can need: the peer does not follow the protocol.
        """
        most = self.codec.most_bytes(num_values)
        if len(values) > most:
            raise AllreduceException(f"sent {len(values)} bytes, not at most {most} for {num_values} values")

    def decode_sum(self, data: Buffer, num_values: int) -> torch.Tensor:
        """What a reducer combined, fp32, whose every value is needed.

        Raises:
            AllreduceException: the bytes are no values of the run's codec, or not finite.
        """
        try:
            return self.codec.decode(data, num_values)
        except BadTensors as error:
            raise AllreduceException(f"sent a part that cannot be read: {error}") from error


@dataclass(slots=True)
class PartSum:
    """One part's sum: the message that all senders get, and what it decodes to."""

    message: PartMessage
    tensor: torch.Tensor


@dataclass(slots=True)
class _Slot:
    """One part on its way: the pieces that came, by sender, and the future that all senders wait for."""

    future: asyncio.Future[PartSum]
    pieces: list[Piece] = field(default_factory=list)
    awaited: int = 0
    takers: int = 0


class SumReducer(TensorPartReducer):  # type: ignore[misc]
    """Combines each part of this peer's share once every sender gave its piece, in the senders' order."""

    def __init__(
        self,
        part_shapes: Sequence[torch.Size],
        num_senders: int,
        *,
        codec: PartCodec,
        combine: Combine,
        settle: Settle,
    ) -> None:
        super().__init__(part_shapes, num_senders)
        self._codec, self._combine, self._note = codec, combine, settle
        self.failure: Exception | None = None
        self.failed = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._slots: dict[int, _Slot] = {
            index: _Slot(future=loop.create_future(), pieces=[None] * num_senders, awaited=num_senders)
            for index in range(len(part_shapes))
        }

    async def accumulate_part(
        self, sender_index: int, part_index: int, tensor_part: Piece, weight: float = 1.0
    ) -> PartSum:
        """Take one sender's piece, wait for all others', return the sum. `weight` is the sender's claim: ignored."""
        if self.failure is not None:
            raise self.failure
        if part_index != self.num_parts_received[sender_index]:
            raise AllreduceException(f"part {part_index} of sender {sender_index} is out of order")
        self.num_parts_received[sender_index] += 1
        slot = self._slots[part_index]
        slot.pieces[sender_index] = tensor_part
        slot.awaited -= 1
        if not slot.awaited:
            job = asyncio.get_running_loop().run_in_executor(None, self._finish, part_index, slot.pieces)
            job.add_done_callback(functools.partial(self._settle, slot))
        result = await asyncio.shield(slot.future)  # a branch: the sender's end must not cancel what others wait for
        slot.takers += 1
        if slot.takers == self.num_senders:
            self._slots.pop(part_index, None)
        return result

    def fail(self, failure: Exception) -> None:
        """Let all who wait, now and later, have `failure`. What is summed already stays."""
        if self.failure is None:
            self.failure = failure
            self.failed.set()
            for slot in self._slots.values():
                if not slot.future.done():
                    slot.future.set_exception(failure)
                    slot.future.exception()  # retrieved: a part may have no waiter yet

    def finalize(self) -> None:
        """Nothing to do but mark the end: `fail` has told all who wait."""
        self.finished.set()

    def __del__(self) -> None:  # the base class touches futures here, whose loop may be gone
        pass

    def _finish(self, part_index: int, pieces: Sequence[Piece]) -> PartSum:
        try:
            combined = self._combine(part_index, pieces)
            data = self._codec.encode(combined)
        except BadTensors as error:  # too few updates for a robust mean, or a sum that is not finite
            raise AllreduceException(str(error)) from error
        message = PartMessage.written(averaging_pb2.AVERAGED_PART, data)
        decoded = self._codec.decode_sum(data, combined.numel()) if self._codec.codec.is_lossy else combined
        self._note(part_index, combined, decoded)
        return PartSum(message=message, tensor=decoded)

    def _settle(self, slot: _Slot, job: asyncio.Future[PartSum]) -> None:
        slot.pieces = []
        error = None if job.cancelled() else job.exception()
        if isinstance(error, Exception):
            self.fail(error)
        elif not slot.future.done():
            slot.future.set_result(job.result())
