"""What one class's streams carry, checked and counted, and who is still owed an answer on them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

import torch
from hivemind.averaging.partition import AllreduceException
from hivemind.p2p import PeerID
from hivemind.proto import averaging_pb2

from averaging.codecs import Buffer
from averaging.errors import BadTensors
from averaging.hivemind_lost import LostPeer
from averaging.hivemind_reducer import PartCodec, Piece
from averaging.part_message import PartMessage
from averaging.parts import Stretch
from peers.streams.send_limit import SendLimit

Numbered = tuple[PartMessage, Stretch]
"""A message, and which part of the class it must be."""

FRAME_BYTES = 9  # hivemind puts a mark and a length before each message


class Wire:
    """What one class's messages carry: checked, decoded and counted, those sent as well as those received."""

    def __init__(self, codec: PartCodec, holders: Sequence[PeerID], max_update: float, limit: SendLimit) -> None:
        self.bytes_sent = 0
        self._codec, self._holders, self._max_update, self._limit = codec, holders, max_update, limit
        self._received: list[int] = []  # of each part; threads append to it

    @property
    def bytes_received(self) -> int:
        """With what is around each part."""
        return sum(self._received)

    async def sent(self, message: PartMessage) -> PartMessage:
        """Count a message, and hand it on as soon as this peer's limit lets it go."""
        await self._limit.take(message.num_bytes + FRAME_BYTES)
        self.bytes_sent += message.num_bytes + FRAME_BYTES
        return message

    async def numbered(self, stream: AsyncIterator[PartMessage], own: Sequence[Stretch]) -> AsyncIterator[Numbered]:
        """Each message with the stretch that it must be; what is no part of this class raises."""
        part_index = 0
        async for message in stream:
            if message.code == averaging_pb2.CANCELLED and message.culprit:
                culprit = PeerID(message.culprit)
                if culprit in self._holders:
                    raise LostPeer(culprit, "was lost by another holder")
            if message.code not in (averaging_pb2.PART_FOR_AVERAGING, averaging_pb2.AVERAGED_PART):
                raise AllreduceException(f"sent code {message.code} in place of a part")
            if part_index >= len(own):
                raise AllreduceException(f"sent more than {len(own)} parts")
            yield message, own[part_index]
            part_index += 1

    def piece(self, numbered: Numbered) -> Piece:
        """The piece in a message of `numbered`; None where its values can be no update."""
        try:
            piece = self._codec.codec.decode(self._taken(numbered), numbered[1].num_values)
        except BadTensors:
            return None
        return self.own(piece)

    def own(self, piece: torch.Tensor) -> Piece:
        """A finite piece, this peer's own too; None where its values can be no update."""
        lowest, highest = torch.aminmax(piece)
        return piece if -self._max_update <= float(lowest) and float(highest) <= self._max_update else None

    def combined(self, numbered: Numbered) -> torch.Tensor:
        """The sum in a message of `numbered`."""
        return self._codec.decode_sum(self._taken(numbered), numbered[1].num_values)

    def _taken(self, numbered: Numbered) -> Buffer:
        message, stretch = numbered
        self._codec.check_size(message.values, stretch.num_values)
        self._received.append(message.num_bytes + FRAME_BYTES)
        return message.values


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
