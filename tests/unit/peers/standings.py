"""Hosts to place in tests."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

from blocks.spans import Span
from peers.network import PeerId
from peers.placing.moving import Move
from peers.placing.standing import Standing


def host(name: str, span: Span, rate: float = 1.0, capacity: int | None = None, **others: object) -> Standing:
    """A host that has room for what it holds, unless told otherwise."""
    return Standing(
        peer=PeerId(name),
        span=span,
        block_rate=rate,
        capacity=len(span) if capacity is None else capacity,
        **others,  # type: ignore[arg-type]
    )


def hosts(spans: Iterable[tuple[int, int]], capacity: int | None = None) -> list[Standing]:
    """Hosts a, b, c ... of equal speed."""
    return [host(chr(97 + place), Span(*span), capacity=capacity) for place, span in enumerate(spans)]


def covered(standings: Sequence[Standing]) -> set[int]:
    """Blocks that somebody serves, or is bound for."""
    return {block for one in standings for block in one.goal.blocks()}


def moved(standings: Sequence[Standing], move: Move, now: float) -> list[Standing]:
    """The swarm once the move is made."""
    return [
        replace(one, span=move.span, moves_to=None, since=now, moved=True) if one.peer == move.peer else one
        for one in standings
    ]


def promised(standings: Sequence[Standing], *moves: tuple[Move, float]) -> list[Standing]:
    """The swarm once each of the moves is promised, at its time."""
    found = {move.peer: (move, at) for move, at in moves}
    return [
        replace(one, moves_to=found[one.peer][0].span, since=found[one.peer][1], moved=True)
        if one.peer in found
        else one
        for one in standings
    ]


def random_swarm(seed: int, num_peers: int, num_blocks: int) -> list[Standing]:
    """Hosts of various speeds and capacities, where they may overlap and leave gaps."""
    rng = random.Random(seed)
    found = []
    for place in range(num_peers):
        capacity = rng.randint(1, num_blocks)
        length = rng.randint(1, capacity)
        start = rng.randint(0, num_blocks - length)
        rate = 50 ** rng.random()
        found.append(host(f"p{place}", Span(start, start + length), rate, capacity, pinned=rng.random() < 0.15))
    return found
