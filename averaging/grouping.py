"""Who averages with whom when a run has more live peers than one group should hold. Pure: no clock, no network.

Peers that share no block never need to meet, so that each connected part of the swarm has its rounds for itself. A part
that is still too large mixes over several rounds on a grid, as in Moshpit SGD (2103.03239): in each round those meet
who differ in one coordinate, and after as many rounds as there are coordinates, which is logarithmic in the number of
peers, everybody's change has reached everybody.

Peers behind NAT cannot call each other: no group forms among them alone, and nobody could reduce for it. So each group
gets a member that can be called, as long as there are any.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from averaging.config import MAX_GROUP_PEERS
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


def meeting_of(
    me: PeerId,
    spans: Mapping[PeerId, Span],
    number: int,
    group_peers: int,
    behind_nat: Collection[PeerId] = frozenset(),
) -> Meeting:
    """With whom `me` averages in round `number`; `spans` are those of all live peers, `me` among them.

    Nobody can call those `behind_nat`. A group has more than `group_peers` members, up to MAX_GROUP_PEERS, only where
    too few can be called for more groups.
    """
    if len(spans) <= group_peers:
        return Meeting(members=frozenset(spans), label="", is_mixing=False)
    part, is_mixing = _part_of(me, spans, group_peers, frozenset(behind_nat))
    # Named by its first block: a peer that one member has not seen yet must not give them two names.
    name = f"from {spans[part[0]].start}"
    if not is_mixing:
        return Meeting(members=frozenset(part), label=_label(name), is_mixing=False)
    groups = _all_reached(_lines(part, number, group_peers), number, frozenset(behind_nat))
    own = next(line for line, members in groups.items() if me in members)
    return Meeting(members=frozenset(groups[own]), label=_label(f"{number}:{own} {name}"), is_mixing=True)


def rounds_to_mix(num_peers: int, group_peers: int) -> int:
    """After how many rounds everybody's change has reached everybody; 1 where one group holds all."""
    rounds = 1
    while group_peers**rounds < num_peers:
        rounds += 1
    return rounds


def _lines(part: Sequence[PeerId], number: int, group_peers: int) -> dict[str, list[PeerId]]:
    """The groups of a round, each by the coordinates that its members share and the one along which the round goes.

    The grid is shifted after each full turn: peers that stand on both sides of a line meet, too, when they are the only
    ones that hold a block.
    """
    turns = rounds_to_mix(len(part), group_peers)
    width = math.ceil(len(part) ** (1 / turns) - 1e-9)
    turn, shift = number % turns, (number // turns) * (width // 2 + 1)
    lines: dict[str, list[PeerId]] = {}
    for place, peer in enumerate(part):
        rest = (place + shift) % len(part)
        digits = []
        for _ in range(turns):
            rest, digit = divmod(rest, width)
            digits.append(digit)
        digits[turn] = -1
        lines.setdefault(".".join(map(str, digits)), []).append(peer)
    return lines


def _all_reached(
    lines: Mapping[str, Sequence[PeerId]], number: int, behind_nat: frozenset[PeerId]
) -> dict[str, list[PeerId]]:
    """The same groups where each has a member that can be called; else as few of them changed as do.

    A group without one exchanges a member with a group that has several; when none has several any more, it joins the
    smallest that has one. Which ones are exchanged, and who is left without where even that is too many for one group,
    differs from round to round: so none is kept from its neighbours for long.
    """

    def by_chance(name: str) -> bytes:
        return hashlib.sha256(f"{number}:{name}".encode()).digest()

    groups = {name: sorted(members, key=by_chance) for name, members in lines.items()}
    callable_in = {name: [peer for peer in members if peer not in behind_nat] for name, members in groups.items()}
    for name in sorted((name for name, found in callable_in.items() if not found), key=by_chance):
        giver = max(groups, key=lambda other: (len(callable_in[other]), by_chance(other)))
        if len(callable_in[giver]) > 1:
            given, taken = callable_in[giver].pop(), groups[name][0]
            groups[giver][groups[giver].index(given)], groups[name][0] = taken, given
            callable_in[name].append(given)
            continue
        reached = [other for other in groups if callable_in[other]]
        smallest = min(reached, key=lambda other: (len(groups[other]), by_chance(other)), default=None)
        if smallest is not None and len(groups[smallest]) + len(groups[name]) <= MAX_GROUP_PEERS:
            groups[smallest] += groups.pop(name)
    return groups


def _part_of(
    me: PeerId, spans: Mapping[PeerId, Span], group_peers: int, behind_nat: frozenset[PeerId]
) -> tuple[list[PeerId], bool]:
    """The peers with whom `me` averages sooner or later, by their place along the model; and whether in several groups.

    They share blocks, directly or through others. Where all of them are behind NAT they are joined to the nearest part
    that is not, if it has room.
    """
    parts = _connected(spans)
    reached = [place for place, part in enumerate(parts) if not behind_nat.issuperset(part)]
    joined = [list(part) for part in parts]
    for place in sorted(set(range(len(parts))) - set(reached)):
        for other in sorted(reached, key=lambda each: (abs(each - place), each)):
            if len(parts[other]) > group_peers or len(joined[other]) + len(parts[place]) <= MAX_GROUP_PEERS:
                joined[other] += joined[place]
                joined[place] = []
                break
    place = next(place for place, part in enumerate(joined) if me in part)
    part = sorted(joined[place], key=lambda peer: _place(peer, spans))
    # What joins a part that is one group makes it a larger one, so that holders stay equal.
    return part, len(parts[place]) > group_peers


def _connected(spans: Mapping[PeerId, Span]) -> list[list[PeerId]]:
    """The peers that share blocks with each other, directly or through others, by their place along the model."""
    ordered = sorted(spans, key=lambda peer: _place(peer, spans))
    parts: list[list[PeerId]] = []
    reached = -1
    for peer in ordered:
        if not parts or spans[peer].start >= reached:
            parts.append([])
        parts[-1].append(peer)
        reached = max(reached, spans[peer].end)
    return parts


def _place(peer: PeerId, spans: Mapping[PeerId, Span]) -> tuple[int, int, PeerId]:
    return spans[peer].start, spans[peer].end, peer


def _label(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"{int.from_bytes(digest[:8], 'big') >> (64 - _LABEL_BITS):0{_LABEL_BITS}b}"
