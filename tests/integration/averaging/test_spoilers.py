"""One peer whose vote alone keeps a class from applying: named by all others, who go on without it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch

from averaging.averager import RoundOutcome
from averaging.exchange import Group, UnitClass, Vote
from averaging.hivemind_exchange import HivemindExchange
from blocks.spans import Span, unit_of
from peers.network import PeerId
from tests.integration.averaging.round_nodes import Member, members

UNIT = unit_of("default", 0)


class Naysayer(HivemindExchange):
    """Has every part, and says that it has not."""

    async def vote(
        self, group: Group, classes: Sequence[UnitClass], votes: Mapping[bytes, Vote], *, deadline: float
    ) -> Mapping[bytes, Mapping[PeerId, Vote]]:
        votes = {key: replace(vote, complete=False) for key, vote in votes.items()}
        return await super().vote(group, classes, votes, deadline=deadline)


class OtherBits(HivemindExchange):
    """Says that something else came of it."""

    async def vote(
        self, group: Group, classes: Sequence[UnitClass], votes: Mapping[bytes, Vote], *, deadline: float
    ) -> Mapping[bytes, Mapping[PeerId, Vote]]:
        votes = {key: replace(vote, digest=bytes(32)) for key, vote in votes.items()}
        return await super().vote(group, classes, votes, deadline=deadline)


async def play(peers: list[Member], number: int) -> list[RoundOutcome]:
    begin_at = time.time() + 0.3
    async with asyncio.timeout(60):
        return await asyncio.gather(*[peer.round(number, begin_at=begin_at, expected=len(peers)) for peer in peers])


@pytest.mark.parametrize("kind", [Naysayer, OtherBits])
async def test_who_alone_votes_against_all_others_is_named_and_they_go_on_without_it(tmp_path, kind):
    async with members(tmp_path, [Span(0, 1)] * 4, [HivemindExchange] * 3 + [kind]) as peers:
        spoiler = peers[3].network.peer_id
        for outcome in (await play(peers, 1))[:3]:
            assert outcome.kept.keys() == {UNIT}
            assert outcome.spoilers == {spoiler}
            assert not outcome.missing
        for peer in peers[:3]:
            peer.distrusts = frozenset({spoiler})
        *honest, outcast = await play(peers, 2)
        assert "distrust" in outcast.kept[UNIT]
        assert all(outcome.applied.keys() == {UNIT} and not outcome.spoilers for outcome in honest)
        first = honest[0].applied[UNIT].tensors
        assert all(
            torch.equal(value, other.applied[UNIT].tensors[name]) for name, value in first.items() for other in honest
        )
