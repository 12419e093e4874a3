"""Who averages with whom when a run has more live peers than one group should hold. Pure: no clock, no network.

Peers that share no block never need to meet, so that each connected part of the swarm has its rounds for itself. A part
that is still too large mixes over several rounds on a grid, as in Moshpit SGD (2103.03239): in each round those meet
who differ in one coordinate, and after as many rounds as there are coordinates, which is logarithmic in the number of
peers, everybody's change has reached everybody.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

from blocks.spans import Span
from peers.network import PeerId

_LABEL_BITS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Meeting:
    """One round's group: its members, and a name of 0s and 1s that only they use (empty: all meet).

    Groups that mix hold different states in between, so that their members bring whole values instead of changes.
    """

    members: frozenset[PeerId]
    label: str
    is_mixing: bool


def meeting_of(me: PeerId, spans: Mapping[PeerId, Span], number: int, group_peers: int) -> Meeting:
    """With whom `me` averages in round `number`; `spans` are those of all live peers, `me` among them."""
    if len(spans) <= group_peers:
        return Meeting(members=frozenset(spans), label="", is_mixing=False)
    part = _connected(me, spans)
    if len(part) <= group_peers:
        # Named by its first block: a peer that one member has not seen yet must not give them two names.
        return Meeting(members=frozenset(part), label=_label(f"from {spans[part[0]].start}"), is_mixing=False)
    cells = _cells(part, number, group_peers)
    own = cells[me]
    members = frozenset(peer for peer, cell in cells.items() if cell == own)
    return Meeting(members=members, label=_label(f"{number}:{own}"), is_mixing=True)


def rounds_to_mix(num_peers: int, group_peers: int) -> int:
    """After how many rounds everybody's change has reached everybody; 1 where one group holds all."""
    rounds = 1
    while group_peers**rounds < num_peers:
        rounds += 1
    return rounds


def _cells(part: list[PeerId], number: int, group_peers: int) -> dict[PeerId, str]:
    """Each peer's coordinates without the one along which this round goes, and which one that is.

    The grid is shifted after each full turn: peers that stand on both sides of a line meet, too, when they are the only
    ones that hold a block.
    """
    turns = rounds_to_mix(len(part), group_peers)
    width = math.ceil(len(part) ** (1 / turns) - 1e-9)
    turn, shift = number % turns, (number // turns) * (width // 2 + 1)
    cells = {}
    for place, peer in enumerate(part):
        rest = (place + shift) % len(part)
        digits = []
        for _ in range(turns):
            rest, digit = divmod(rest, width)
            digits.append(digit)
        digits[turn] = -1
        cells[peer] = ".".join(map(str, digits))
    return cells


def _connected(me: PeerId, spans: Mapping[PeerId, Span]) -> list[PeerId]:
    """The peers that share blocks with `me`, directly or through others, by their place along the model."""
    ordered = sorted(spans, key=lambda peer: _place(peer, spans))
    parts: list[list[PeerId]] = []
    reached = -1
    for peer in ordered:
        if not parts or spans[peer].start >= reached:
            parts.append([])
        parts[-1].append(peer)
        reached = max(reached, spans[peer].end)
    return next(part for part in parts if me in part)


def _place(peer: PeerId, spans: Mapping[PeerId, Span]) -> tuple[int, int, PeerId]:
    return spans[peer].start, spans[peer].end, peer


def _label(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"{int.from_bytes(digest[:8], 'big') >> (64 - _LABEL_BITS):0{_LABEL_BITS}b}"
