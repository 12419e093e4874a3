"""Rounds of up to four peers through every order of deaths and losses."""

from __future__ import annotations

import asyncio

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from averaging import merge
from averaging.averager import Averager, RoundOutcome
from averaging.config import AveragingConfig
from averaging.errors import RoundFailed
from averaging.exchange import Brought, Call
from averaging.merging import UnitView
from averaging.unit_round import UnitInput
from blocks.spans import UnitId, unit_of
from peers.network import PeerId
from tests.fakes_averaging import Crashed, FakeExchange, FakeSwarm, Fault

PEERS = tuple(PeerId(name) for name in ("ann", "bob", "cat", "dan"))
SPANS = {"ann": (0, 4), "bob": (2, 6), "cat": (0, 6), "dan": (4, 6)}
WEIGHTS = {"ann": 1.0, "bob": 3.0, "cat": 0.5, "dan": 2.0}
CONFIG = AveragingConfig(read_seconds=5)


def units_of(peer: PeerId) -> dict[UnitId, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(PEERS.index(peer))
    return {
        unit_of("default", block): {
            "A": torch.randn(3, 4, generator=generator),
            "B": torch.randn(5, generator=generator),
        }
        for block in range(*SPANS[peer])
    }


def inputs_of(peer: PeerId, units: dict[UnitId, dict[str, torch.Tensor]] | None = None) -> dict[UnitId, UnitInput]:
    """Trained from zeros, so that the change is the value itself."""
    return {
        unit: UnitInput(
            view=UnitView(
                unit=unit, round=0, live=live, anchor={name: torch.zeros(t.shape) for name, t in live.items()},
                outer={}, scaling=1.0,
            )
        )
        for unit, live in (units_of(peer) if units is None else units).items()
    }  # fmt: skip


def brought_of(peer: PeerId) -> dict[UnitId, Brought]:
    return dict.fromkeys(units_of(peer), Brought(samples=WEIGHTS[peer]))


def call(expected: int) -> Call:
    return Call(begin_at=0.0, window=1.0, deadline=10.0, expected=expected)


async def play(faults: dict[PeerId, Fault], numbers: dict[PeerId, int] | None = None):
    """One round of all peers; what each came to: an outcome, RoundFailed, or Crashed."""
    swarm = FakeSwarm(peers=PEERS, faults=faults)

    async def one(peer: PeerId):
        async def read():
            return inputs_of(peer)

        averager = Averager(FakeExchange(swarm, peer), peer, "layout", CONFIG)
        number = (numbers or {}).get(peer, 7)
        try:
            return await averager.run_round(number, call(len(PEERS)), brought_of(peer), read)
        except (Crashed, RoundFailed) as error:
            return error

    async with asyncio.timeout(20):
        return dict(zip(PEERS, await asyncio.gather(*[one(peer) for peer in PEERS]), strict=True))


def mean_of(unit: UnitId, name: str, peers: list[PeerId]) -> torch.Tensor:
    return merge.weighted_mean([units_of(peer)[unit][name] for peer in peers], [WEIGHTS[peer] for peer in peers])


fault = st.builds(
    Fault,
    phase=st.sampled_from(["gather", "reduce", "vote"]),
    reached=st.frozensets(st.sampled_from(PEERS)),
    survives=st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(PEERS), fault, max_size=3))
def test_a_unit_is_applied_by_all_survivors_or_by_none_unless_a_vote_was_lost(faults):
    outcomes = asyncio.run(play(faults))
    alive = {peer: outcome for peer, outcome in outcomes.items() if isinstance(outcome, RoundOutcome)}
    in_group = [peer for peer in PEERS if not (peer in faults and faults[peer].phase == "gather")]
    for unit in {unit for peer in PEERS for unit in units_of(peer)}:
        holders = [peer for peer in in_group if unit in units_of(peer)]
        survivors = [peer for peer in holders if peer in alive]
        applied = [peer for peer in survivors if unit in alive[peer].applied]
        for peer in survivors:
            assert (unit in alive[peer].applied) != (unit in alive[peer].kept)
        for peer in applied:  # never a mixture: the mean of all holders, equal to the bit
            for name, value in alive[peer].applied[unit].tensors.items():
                torch.testing.assert_close(value, mean_of(unit, name, holders), rtol=1e-6, atol=1e-6)
                assert torch.equal(value, alive[applied[0]].applied[unit].tensors[name])
        vote_was_lost = any(peer in faults and faults[peer].phase == "vote" for peer in holders)
        if not vote_was_lost:
            assert applied in ([], survivors)
        if not any(peer in faults for peer in holders):
            assert applied == survivors


async def test_a_peer_that_dies_in_the_reduce_costs_only_its_own_classes():
    outcomes = await play({PeerId("dan"): Fault(phase="reduce", reached=frozenset({PeerId("bob")}))})
    for peer in ("ann", "cat"):
        assert unit_of("default", 0) in outcomes[peer].applied
    for peer in ("bob", "cat"):
        assert unit_of("default", 5) in outcomes[peer].kept
    assert "dan" in outcomes["cat"].kept[unit_of("default", 5)]
    assert outcomes["cat"].missing == {"dan"}


async def test_a_peer_at_an_older_round_is_told_to_fetch_and_does_not_pull_the_others_back():
    outcomes = await play({}, numbers={PeerId("ann"): 6})
    assert outcomes["ann"].behind
    assert not outcomes["ann"].applied
    assert not outcomes["cat"].behind
    value = outcomes["cat"].applied[unit_of("default", 3)].tensors["A"]
    torch.testing.assert_close(value, mean_of(unit_of("default", 3), "A", [PeerId("bob"), PeerId("cat")]))


async def test_a_round_without_a_group_fails_in_one_line_that_says_what_was_missing():
    nobody = {peer: Fault(phase="gather", survives=True) for peer in PEERS[1:]}
    outcomes = await play(nobody)
    assert isinstance(outcomes["ann"], RoundFailed)
    assert "4 peers were expected" in str(outcomes["ann"])
    assert "\n" not in str(outcomes["ann"])


async def test_a_peer_on_its_own_applies_its_units_without_a_network():
    async def read():
        return inputs_of(PEERS[0])

    averager = Averager(FakeExchange(FakeSwarm(peers=PEERS), PEERS[0]), PEERS[0], "layout", CONFIG)
    outcome = await averager.run_round(3, call(1), brought_of(PEERS[0]), read)
    assert outcome.applied.keys() == units_of(PEERS[0]).keys()
    assert outcome.samples == dict.fromkeys(units_of(PEERS[0]), WEIGHTS["ann"])
    for unit, tensors in units_of(PEERS[0]).items():
        assert all(torch.equal(outcome.applied[unit].tensors[name], value) for name, value in tensors.items())


async def test_a_peer_on_its_own_keeps_the_old_value_of_what_has_diverged_or_is_gone():
    units = units_of(PEERS[0])
    units[unit_of("default", 1)]["A"][0, 0] = torch.nan
    del units[unit_of("default", 2)]

    async def read():
        return inputs_of(PEERS[0], units)

    averager = Averager(FakeExchange(FakeSwarm(peers=PEERS), PEERS[0]), PEERS[0], "layout", CONFIG)
    outcome = await averager.run_round(3, call(1), brought_of(PEERS[0]), read)
    assert outcome.applied.keys() == {unit_of("default", 0), unit_of("default", 3)}
    assert "not finite" in outcome.kept[unit_of("default", 1)]
    assert "not held any more" in outcome.kept[unit_of("default", 2)]


@pytest.mark.parametrize("damage", ["nan", "float16", "gone", "slow"])
async def test_a_class_that_cannot_be_read_is_kept_by_all_its_holders(damage):
    swarm = FakeSwarm(peers=PEERS[:3])
    config = AveragingConfig(read_seconds=0.01) if damage == "slow" else CONFIG

    async def one(peer: PeerId) -> RoundOutcome:
        async def read():
            units = units_of(peer)
            if peer == "bob":
                match damage:
                    case "nan":
                        units[unit_of("default", 2)]["A"][0, 0] = torch.nan
                    case "float16":
                        units[unit_of("default", 2)] = {n: t.half() for n, t in units[unit_of("default", 2)].items()}
                    case "gone":
                        del units[unit_of("default", 2)]
                    case "slow":
                        await asyncio.Event().wait()
            return inputs_of(peer, units)

        averager = Averager(FakeExchange(swarm, peer), peer, "layout", config)
        return await averager.run_round(1, call(3), brought_of(peer), read)

    async with asyncio.timeout(30):
        ann, bob, cat = await asyncio.gather(*[one(peer) for peer in PEERS[:3]])
    shared = unit_of("default", 2)
    assert shared in ann.kept
    assert shared in bob.kept
    assert shared in cat.kept
    assert unit_of("default", 0) in ann.applied
