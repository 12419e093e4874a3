"""A peer that nobody can dial is connected to all whom it can dial, and asks those again who did not answer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from blocks.spans import Span
from peers.errors import NetworkFailed
from peers.network import PeerId
from peers.records import PeerRecord, ProgressRecord
from swarm.reaching import MOST_CONNECTIONS, Reaching, to_dial
from swarm.units.company import Surroundings
from tests.fakes import RUN, fake_peer_id, peer_record

FRONT, BACK = Span(0, 2), Span(2, 4)
ME, ANN, BOB, CAT = (fake_peer_id(name) for name in ("me", "ann", "bob", "cat"))


def record(peer: PeerId, span: Span = BACK, **changes: object) -> PeerRecord:
    return replace(peer_record(peer, span), **changes)


@dataclass
class FakeDialler:
    """`gone` do not answer."""

    peer_id: PeerId = ME
    there: set[PeerId] = field(default_factory=set)
    gone: set[PeerId] = field(default_factory=set)
    dialled: list[PeerId] = field(default_factory=list)

    async def connected(self) -> frozenset[PeerId]:
        return frozenset(self.there)

    async def connect(self, peer: PeerId, addresses: tuple[str, ...]) -> None:
        assert addresses
        self.dialled.append(peer)
        if peer in self.gone:
            raise NetworkFailed(f"peer {peer} cannot be reached")
        self.there.add(peer)


async def test_who_is_not_connected_is_dialled_once_and_who_did_not_answer_again_later() -> None:
    now = 0.0
    dialler = FakeDialler(there={ANN}, gone={CAT})
    records = [record(ANN), record(BOB), record(CAT), record(ME), record(fake_peer_id("nat"), addresses=())]
    reaching = Reaching(dialler, lambda: records, FRONT, clock=lambda: now)
    await reaching.look()
    assert sorted(dialler.dialled) == sorted([BOB, CAT])
    await reaching.look()
    assert len(dialler.dialled) == 2
    now, dialler.gone = 16.0, set()
    dialler.there.discard(BOB)  # the connection broke
    await reaching.look()
    assert sorted(dialler.dialled[2:]) == sorted([BOB, CAT])


def test_of_too_many_those_with_the_same_blocks_come_first() -> None:
    others = [record(fake_peer_id(f"back-{index}")) for index in range(MOST_CONNECTIONS)]
    same = record(ANN, FRONT)
    wanted = to_dial([*others, same], FRONT, ())
    assert len(wanted) == MOST_CONNECTIONS
    assert wanted[0] == same
    assert len(to_dial([*others, same], FRONT, {ANN})) == MOST_CONNECTIONS - 1  # its place is not another's


@pytest.mark.parametrize(("behind_nat", "found"), [(True, ["ann"]), (False, ["ann", "bob"])])
def test_who_is_behind_nat_asks_nobody_who_is_too(behind_nat: bool, found: list[str]) -> None:
    around = Surroundings(directory=None, pool=None, dht_time=None, router=None, behind_nat=behind_nat)  # type: ignore[arg-type]
    records = [
        ProgressRecord(
            run=RUN, peer=peer, span=FRONT, round=3, samples=0, total_samples=0, behind_nat=hidden, expires_at=1060.0
        )
        for peer, hidden in ((ANN, False), (BOB, True))
    ]
    assert [each.peer for each in around.reachable(records)] == [fake_peer_id(name) for name in found]
