"""Lanes: the ways that trainers have opened for their microbatches through this host. Rules only.

A lane is opened by its trainer itself, over its own transport, and names the neighbours; so each host knows who may
send it work in whose name, and no message has to carry a chain.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from blocks.spans import Span
from peers.errors import BadMessage, Refused
from peers.network import PeerId
from peers.streams.messages import RefusalCode
from peers.streams.values import Place

MAX_LANES_PER_OWNER = 128
MAX_LANES = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class Lane:
    """One way through this host's `span`. `stream` is where it was opened: it ends with that."""

    name: str
    owner: PeerId
    stream: int
    span: Span
    previous: Place | None
    onward: Place | None

    def check_forward(self, peer: PeerId) -> None:
        """Refuse activations from anyone but the neighbour before, or the owner where there is none.

        Raises:
            BadMessage: another peer sends.
        """
        self._check(peer, self.previous)

    def check_backward(self, peer: PeerId) -> None:
        """Refuse gradients from anyone but the neighbour behind, or the owner where there is none.

        Raises:
            BadMessage: another peer sends.
        """
        self._check(peer, self.onward)

    def _check(self, peer: PeerId, neighbour: Place | None) -> None:
        if peer != (self.owner if neighbour is None else neighbour.peer):
            raise BadMessage("work on a lane comes from the neighbour that its owner named, or from the owner itself")


class Lanes:
    """All open lanes by name. Bounded: an owner who opens too many loses the one that it used longest ago."""

    def __init__(self) -> None:
        self._lanes: OrderedDict[str, Lane] = OrderedDict()

    def __len__(self) -> int:
        return len(self._lanes)

    def open(self, lane: Lane) -> None:
        """Add a lane.

        Raises:
            BadMessage: the name is taken by another peer.
            Refused: too many are open here.
        """
        before = self._lanes.get(lane.name)
        if before is not None and before.owner != lane.owner:
            raise BadMessage("a lane of this name is open already; choose another name")
        own = [name for name, other in self._lanes.items() if other.owner == lane.owner]
        if len(own) >= MAX_LANES_PER_OWNER:
            del self._lanes[own[0]]
        if len(self._lanes) >= MAX_LANES:
            raise Refused(f"{MAX_LANES} lanes are open here; try another host", RefusalCode.FULL)
        self._lanes[lane.name] = lane

    def find(self, name: str) -> Lane:
        """The lane of this name.

        Raises:
            Refused: there is none, or not any more.
        """
        lane = self._lanes.get(name)
        if lane is None:
            raise Refused("this lane is not open here; open it again", RefusalCode.SESSION)
        self._lanes.move_to_end(name)
        return lane

    def close_stream(self, stream: int) -> list[Lane]:
        """Forget the lanes that were opened over a stream; returns them."""
        gone = [lane for lane in self._lanes.values() if lane.stream == stream]
        for lane in gone:
            del self._lanes[lane.name]
        return gone
