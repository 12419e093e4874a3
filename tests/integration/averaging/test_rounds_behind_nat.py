"""Rounds with peers that can dial others and be dialled by nobody, among real hivemind nodes on loopback."""

from __future__ import annotations

from dataclasses import replace

import torch

from averaging import merge
from averaging.recipe import Recipe
from averaging.unit_round import UnitRules
from blocks.spans import Span, unit_of
from tests.integration.averaging.round_nodes import CONFIG, members
from tests.integration.averaging.test_hivemind_rounds import assert_equals_the_mean, play

OTHER, SHARED = Span(0, 2), Span(2, 6)


async def test_two_holders_behind_nat_average_through_a_peer_that_holds_other_blocks(tmp_path):
    async with members(tmp_path, [OTHER, SHARED, SHARED], behind_nat=[1, 2]) as peers:
        for number in (1, 2):
            outcomes = await play(peers, number)
            assert [outcome.helped for outcome in outcomes] == [1, 0, 0]
            for peer, outcome in zip(peers, outcomes, strict=True):
                assert outcome.applied.keys() == peer.units().keys(), outcome.kept
            for block in SHARED.blocks():
                assert_equals_the_mean(peers, outcomes, unit_of("default", block))


async def test_holders_behind_nat_and_a_reachable_one_hear_of_each_other_through_it(tmp_path):
    async with members(tmp_path, [SHARED, SHARED, Span(0, 6)], behind_nat=[1, 2]) as peers:
        outcomes = await play(peers, 1)
        assert [outcome.helped for outcome in outcomes] == [0, 0, 0]
        for peer, outcome in zip(peers, outcomes, strict=True):
            assert outcome.applied.keys() == peer.units().keys(), outcome.kept
        for block in range(6):
            assert_equals_the_mean(peers, outcomes, unit_of("default", block))


async def test_helpers_follow_the_runs_rules_and_all_holders_have_the_same_bits(tmp_path):
    config = replace(CONFIG, recipe=Recipe(robust="clip", weighting="equal", codec="int8"))
    async with members(tmp_path, [OTHER, *[SHARED] * 3, OTHER], config=config, behind_nat=[1, 2, 3]) as peers:
        outcomes = await play(peers, 1)
        assert [outcome.helped for outcome in outcomes] == [1, 0, 0, 0, 1]
        holders = peers[1:4]
        for block in SHARED.blocks():
            unit = unit_of("default", block)
            for name, tensor in outcomes[1].applied[unit].tensors.items():
                for outcome in outcomes[2:4]:
                    assert torch.equal(outcome.applied[unit].tensors[name], tensor)
                mean = merge.weighted_mean([peer.units()[unit][name] for peer in holders], [1.0] * 3)
                assert float((tensor - mean).norm() / mean.norm()) < 0.5  # the rule's own error is tested elsewhere


async def test_a_helper_that_cannot_help_costs_the_class_its_round_and_says_why(tmp_path):
    async with members(tmp_path, [OTHER, SHARED, SHARED], behind_nat=[1, 2]) as peers:
        peers[0].use(UnitRules(CONFIG.recipe, shapes={}))
        ann, *holders = await play(peers, 1)
        assert ann.applied.keys() == peers[0].units().keys()
        assert ann.helped == 0
        for outcome in holders:
            assert not outcome.applied
            assert outcome.kept.keys() == peers[1].units().keys()
            assert peers[0].network.peer_id in outcome.missing
