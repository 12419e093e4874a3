"""Four peers through several rounds with crashes and lost votes in any order, catching up in between as hosts do."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from averaging import merge
from averaging.averager import Averager, RoundOutcome
from averaging.config import AveragingConfig
from averaging.errors import RoundFailed
from averaging.exchange import Brought, Call, Version
from averaging.merging import UnitView
from averaging.unit_round import UnitInput
from blocks.spans import UnitId, unit_of
from peers.network import PeerId
from tests.fakes_averaging import Crashed, FakeExchange, FakeSwarm, Fault

PEERS = tuple(PeerId(name) for name in ("ann", "bob", "cat", "dan"))
SPANS = {"ann": (0, 2), "bob": (1, 3), "cat": (0, 3), "dan": (2, 3)}
CONFIG = AveragingConfig(read_seconds=5)
ROUNDS = 4


@dataclass
class Unit:
    version: Version = field(default_factory=Version)
    anchor: torch.Tensor = field(default_factory=lambda: torch.zeros(6))
    live: torch.Tensor = field(default_factory=lambda: torch.zeros(6))


class Holder:
    """One peer's units: trained at random between rounds, replaced by what a round or another holder gives."""

    def __init__(self, peer: PeerId) -> None:
        self.peer = peer
        self.number = 0
        self.units = {unit_of("default", block): Unit() for block in range(*SPANS[peer])}
        self._dice = torch.Generator().manual_seed(PEERS.index(peer))

    def train(self) -> None:
        for unit in self.units.values():
            unit.live = unit.live + torch.randn(6, generator=self._dice)

    def brought(self) -> dict[UnitId, Brought]:
        return {name: Brought(samples=2.0, version=unit.version) for name, unit in self.units.items()}

    def inputs(self) -> dict[UnitId, UnitInput]:
        return {
            name: UnitInput(
                view=UnitView(
                    unit=name,
                    round=unit.version.number,
                    live={"A": unit.live},
                    anchor={"A": unit.anchor},
                    outer={},
                    scaling=1.0,
                )
            )
            for name, unit in self.units.items()
        }

    def take(self, outcome: RoundOutcome) -> None:
        if outcome.behind:
            return
        self.number = outcome.number
        for name, result in outcome.applied.items():
            value = result.tensors["A"]
            version = Version(number=outcome.number, weight=outcome.samples[name], digest=merge.digest([value])[:8])
            self.units[name] = Unit(version=version, anchor=value, live=value)

    def catch_up(self, others: list[Holder]) -> None:
        for name, unit in self.units.items():
            held = [other.units[name] for other in others if name in other.units]
            newest = max(held, key=lambda each: each.version, default=unit)
            if newest.version > unit.version:
                self.units[name] = Unit(version=newest.version, anchor=newest.anchor, live=newest.anchor)
        self.number = max([self.number, *(other.number for other in others)])


async def play(holders: dict[PeerId, Holder], number: int, faults: dict[PeerId, Fault]) -> dict[PeerId, object]:
    swarm = FakeSwarm(peers=tuple(holders), faults={p: f for p, f in faults.items() if p in holders})

    async def one(holder: Holder) -> object:
        async def read():
            return holder.inputs()

        averager = Averager(FakeExchange(swarm, holder.peer), holder.peer, "layout", CONFIG)
        call = Call(begin_at=0.0, window=1.0, deadline=10.0, expected=len(holders))
        try:
            return await averager.run_round(number, call, holder.brought(), read)
        except (Crashed, RoundFailed) as error:
            return error

    async with asyncio.timeout(20):
        found = await asyncio.gather(*[one(holder) for holder in holders.values()])
    return dict(zip(holders, found, strict=True))


fault = st.builds(
    Fault,
    phase=st.sampled_from(["gather", "reduce", "vote"]),
    reached=st.frozensets(st.sampled_from(PEERS)),
    survives=st.booleans(),
)


def assert_no_mixture(before: dict[PeerId, dict[UnitId, Unit]], outcomes: dict[PeerId, object]) -> None:
    """What was applied is the old state plus the mean change of some of its holders that had the same one."""
    for peer, outcome in outcomes.items():
        if not isinstance(outcome, RoundOutcome):
            continue
        for name, result in outcome.applied.items():
            own = before[peer][name]
            group = [p for p in outcome.peers if name in before[p] and before[p][name].version == own.version]
            mean = torch.stack([before[p][name].live - before[p][name].anchor for p in group]).mean(dim=0)
            torch.testing.assert_close(result.tensors["A"], own.anchor + mean, rtol=1e-5, atol=1e-5)


def assert_equal_where_the_version_is(holders: dict[PeerId, Holder]) -> None:
    by_version: dict = {}
    for holder in holders.values():
        for name, unit in holder.units.items():
            assert torch.equal(by_version.setdefault((name, unit.version), unit.anchor), unit.anchor)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.dictionaries(st.sampled_from(PEERS), fault, max_size=3), min_size=ROUNDS, max_size=ROUNDS),
    st.lists(st.frozensets(st.sampled_from(PEERS)), min_size=ROUNDS, max_size=ROUNDS),
)
def test_no_order_of_crashes_mixes_states_and_one_quiet_round_makes_all_equal(faults, late):
    holders = {peer: Holder(peer) for peer in PEERS}
    number = 1
    for round_faults, slow in zip(faults, late, strict=True):
        for holder in holders.values():
            holder.train()
        before = {peer: dict(holder.units) for peer, holder in holders.items()}
        outcomes = asyncio.run(play(holders, number, round_faults))
        assert_no_mixture(before, outcomes)
        for peer, outcome in outcomes.items():
            if isinstance(outcome, Crashed):
                holders[peer] = Holder(peer)  # started again from nothing
                continue
            if isinstance(outcome, RoundOutcome):
                holders[peer].take(outcome)
            assert all(unit.version >= before[peer][name].version for name, unit in holders[peer].units.items())
        number += 1
        for peer, holder in holders.items():
            if peer not in slow:  # the others have not yet found the time to fetch
                holder.catch_up([other for other in holders.values() if other is not holder])
        assert_equal_where_the_version_is(holders)
    for holder in holders.values():
        holder.catch_up([other for other in holders.values() if other is not holder])
        holder.train()
    outcomes = asyncio.run(play(holders, number, {}))
    for peer, outcome in outcomes.items():
        assert isinstance(outcome, RoundOutcome)
        assert not outcome.kept
        holders[peer].take(outcome)
    for name in {name for holder in holders.values() for name in holder.units}:
        held = [holder.units[name] for holder in holders.values() if name in holder.units]
        assert all(unit.version == held[0].version and torch.equal(unit.live, held[0].live) for unit in held)
