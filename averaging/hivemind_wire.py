"""What one class's streams carry, checked and counted, and who is still owed an answer on them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

import torch
from hivemind.averaging.partition import AllreduceException
from hivemind.p2p import PeerID
from hivemind.proto import averaging_pb2

from averaging.errors import BadTensors
from averaging.hivemind_lost import LostPeer
from averaging.hivemind_reducer import PartCodec, Piece

FRAME_BYTES = 32  # about what hivemind and protobuf put around the values of a part


class Wire:
    """What one class's messages carry: checked, decoded and counted, those sent as well as those received."""

    def __init__(self, codec: PartCodec, holders: Sequence[PeerID], max_update: float) -> None:
        self.bytes_sent = 0
        self._codec, self._holders, self._max_update = codec, holders, max_update
        self._received: list[int] = []  # of each part; threads append to it

    @property
    def bytes_received(self) -> int:
        """With what is around each part."""
        return sum(self._received)

    def sent(self, message: averaging_pb2.AveragingData, num_bytes: int) -> averaging_pb2.AveragingData:
        """Count a message with so many bytes of values, and hand it on. (To tell its size, protobuf would write it.)"""
        self.bytes_sent += num_bytes + FRAME_BYTES
        return message

    async def numbered(
        self, stream: AsyncIterator[averaging_pb2.AveragingData], shapes: Sequence[torch.Size]
    ) -> AsyncIterator[tuple[averaging_pb2.AveragingData, torch.Size]]:
        """Each message with the shape that it must have; what is no part of this class raises."""
        part_index = 0
        async for message in stream:
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

    def piece(self, numbered: tuple[averaging_pb2.AveragingData, torch.Size]) -> Piece:
        """The piece in a message of `numbered`; None where its values can be no update."""
        try:
            piece = self._codec.codec.decode(self._taken(numbered), numbered[1].numel())
        except BadTensors:
            return None
        lowest, highest = torch.aminmax(piece)
        return piece if -self._max_update <= float(lowest) and float(highest) <= self._max_update else None

    def combined(self, numbered: tuple[averaging_pb2.AveragingData, torch.Size]) -> torch.Tensor:
        """The sum in a message of `numbered`."""
        return self._codec.decode_sum(self._taken(numbered), numbered[1])

    def _taken(self, numbered: tuple[averaging_pb2.AveragingData, torch.Size]) -> bytes:
        message, shape = numbered
        data = self._codec.bytes_of(message.tensor_part, shape)
        self._received.append(len(data) + FRAME_BYTES)
        return data


class Senders:
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
