"""The parts of an all-reduce: checked on the way in, summed once all are there, encoded once for everybody."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from hivemind.averaging.partition import AllreduceException, TensorPartReducer
from hivemind.compression import CompressionBase, CompressionInfo, NoCompression
from hivemind.proto import averaging_pb2, runtime_pb2

from averaging import merge


class PartCodec:
    """A part's bytes and back; lossless fp32. What comes from others is checked before it is decoded."""

    def __init__(self) -> None:
        self.compression: CompressionBase = NoCompression()

    def encode(self, tensor: torch.Tensor) -> runtime_pb2.Tensor:
        """One part of a vector as a message."""
        return self.compression.compress(tensor, CompressionInfo.from_tensor(tensor))

    def decode(self, part: runtime_pb2.Tensor, shape: torch.Size) -> torch.Tensor:
        """The part of `shape` (fp32) that a peer sent.

        Raises:
            AllreduceException: wrong size, shape, dtype or codec, or values that are not finite.
        """
        expected_bytes = shape.numel() * 4
        if part.dtype != "float32" or tuple(part.size) != tuple(shape) or len(part.buffer) != expected_bytes:
            raise AllreduceException(
                f"sent {len(part.buffer)} bytes as {part.dtype[:16]} of shape {tuple(part.size)[:4]}, "
                f"not {expected_bytes} as float32 of shape {tuple(shape)}"
            )
        if part.compression != self.compression.compression_type:
            raise AllreduceException(f"sent a part in codec {part.compression}; this run has another")
        tensor: torch.Tensor = self.compression.extract(part)
        if not merge.is_finite(tensor):
            raise AllreduceException("sent values that are not finite")
        return tensor


@dataclass(slots=True)
class PartSum:
    """One part's sum: the message that all senders get, and what it decodes to."""

    message: averaging_pb2.AveragingData
    tensor: torch.Tensor


@dataclass(slots=True)
class _Slot:
    """One part on its way: the pieces that came, by sender, and the future that all senders wait for."""

    future: asyncio.Future[PartSum]
    pieces: list[torch.Tensor | None] = field(default_factory=list)
    takers: int = 0


class SumReducer(TensorPartReducer):  # type: ignore[misc]
    """Combines each part of this peer's share once every sender gave its piece, in the senders' order."""

    def __init__(
        self,
        part_shapes: Sequence[torch.Size],
        num_senders: int,
        *,
        codec: PartCodec,
        combine: Callable[[Sequence[torch.Tensor]], torch.Tensor],
    ) -> None:
        super().__init__(part_shapes, num_senders)
        self._codec, self._combine = codec, combine
        self.failure: Exception | None = None
        self.failed = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._slots: dict[int, _Slot] = {
            index: _Slot(future=loop.create_future(), pieces=[None] * num_senders) for index in range(len(part_shapes))
        }

    async def accumulate_part(
        self, sender_index: int, part_index: int, tensor_part: torch.Tensor, weight: float = 1.0
    ) -> PartSum:
        """Take one sender's piece, wait for all others', return the sum. `weight` is the sender's claim: ignored."""
        if self.failure is not None:
            raise self.failure
        if part_index != self.num_parts_received[sender_index]:
            raise AllreduceException(f"part {part_index} of sender {sender_index} is out of order")
        self.num_parts_received[sender_index] += 1
        slot = self._slots[part_index]
        slot.pieces[sender_index] = tensor_part
        if all(piece is not None for piece in slot.pieces):
            job = asyncio.get_running_loop().run_in_executor(
                None, self._finish, [piece for piece in slot.pieces if piece is not None]
            )
            job.add_done_callback(functools.partial(self._settle, slot))
        result = await asyncio.shield(slot.future)  # a branch: the sender's end must not cancel what others wait for
        slot.takers += 1
        if slot.takers == self.num_senders:
            self._slots.pop(part_index, None)
        return result

    @property
    def is_summed(self) -> bool:
        """Whether every part has come from every sender."""
        return all(count == self.num_parts for count in self.num_parts_received)

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

    def _finish(self, pieces: Sequence[torch.Tensor]) -> PartSum:
        summed = self._combine(pieces)
        if not merge.is_finite(summed):
            raise AllreduceException("the sum of a part is not finite")
        part = self._codec.encode(summed)
        message = averaging_pb2.AveragingData(code=averaging_pb2.AVERAGED_PART, tensor_part=part)
        return PartSum(message=message, tensor=self._codec.decode(part, summed.shape))

    def _settle(self, slot: _Slot, job: asyncio.Future[PartSum]) -> None:
        slot.pieces = []
        error = None if job.cancelled() else job.exception()
        if isinstance(error, Exception):
            self.fail(error)
        elif not slot.future.done():
            slot.future.set_result(job.result())
