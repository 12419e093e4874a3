"""What is owed to units from one round to the next, however the classes are cut."""

from __future__ import annotations

import pytest
import torch

from averaging import merge, planning
from averaging.exchange import Reduced
from averaging.feedback import Feedback
from averaging.merging import UnitView
from averaging.recipe import Recipe
from averaging.rounds import Applied
from averaging.unit_round import UnitInput, UnitRules
from averaging.unit_work import RoundWork
from blocks.spans import unit_of
from peers.network import PeerId
from tests.unit.averaging.contributions import CONFIG, bring, group_of

UNITS = [unit_of("default", block) for block in range(3)]


def tensors(seed: int, num_out: int = 4):
    """B before A, so that the order must come from the names."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "m.lora_B": torch.randn(num_out, 2, generator=generator),
        "m.lora_A": torch.randn(2, 5, generator=generator),
    }


LIKE = {unit: tensors(block) for block, unit in enumerate(UNITS)}
SENT = {unit: tensors(10 + block) for block, unit in enumerate(UNITS)}
SUMMED = {unit: tensors(20 + block) for block, unit in enumerate(UNITS)}


def settled() -> Feedback:
    feedback = Feedback()
    feedback.settle(UNITS, LIKE, merge.flatten(UNITS, SENT), merge.flatten(UNITS, SUMMED))
    return feedback


def owed(feedback: Feedback, units, like=LIKE):
    sent, summed = feedback.owed(units, like)
    assert sent is not None
    assert summed is not None
    return sent, summed


def test_nothing_is_owed_at_first_nor_by_a_codec_that_loses_nothing():
    feedback = Feedback()
    assert feedback.owed(UNITS, LIKE) == (None, None)
    feedback.settle(UNITS, LIKE, None, None)
    assert feedback.owed(UNITS, LIKE) == (None, None)


def test_debts_of_either_side_come_back_as_they_were():
    sent, summed = owed(settled(), UNITS)
    assert torch.equal(sent, merge.flatten(UNITS, SENT))
    assert torch.equal(summed, merge.flatten(UNITS, SUMMED))


def test_one_side_may_owe_alone():
    feedback = Feedback()
    feedback.settle(UNITS, LIKE, merge.flatten(UNITS, SENT), None)
    assert feedback.owed(UNITS, LIKE)[1] is None
    assert torch.equal(feedback.owed(UNITS, LIKE)[0], merge.flatten(UNITS, SENT))


def test_debts_follow_their_units_into_other_classes_in_any_order():
    for units in ([UNITS[1]], [UNITS[2], UNITS[0]]):
        sent, summed = owed(settled(), units)
        assert torch.equal(sent, merge.flatten(units, SENT))
        assert torch.equal(summed, merge.flatten(units, SUMMED))


def test_a_unit_that_owes_nothing_has_zeros_beside_one_that_does():
    feedback = Feedback()
    feedback.settle(UNITS[:1], LIKE, merge.flatten(UNITS[:1], SENT), None)
    sent, _ = feedback.owed(UNITS[:2], LIKE)
    first = merge.flatten(UNITS[:1], SENT)
    assert torch.equal(sent, torch.cat([first, torch.zeros_like(first)]))
    assert feedback.owed(UNITS[1:], LIKE) == (None, None)


def test_a_later_round_replaces_the_debts_of_its_units_and_leaves_those_of_others():
    feedback = settled()
    later = {UNITS[0]: tensors(30)}
    feedback.settle(UNITS[:1], LIKE, merge.flatten(UNITS[:1], later), merge.flatten(UNITS[:1], later))
    for vector, old in zip(owed(feedback, UNITS), (SENT, SUMMED), strict=True):
        assert torch.equal(vector, merge.flatten(UNITS, old | later))


def test_debts_of_a_half_wait_while_the_other_half_is_trained():
    feedback, unit = Feedback(), UNITS[:1]
    halves = [{UNITS[0]: {name: SENT[UNITS[0]][name]}} for name in ("m.lora_A", "m.lora_B")]
    for half in halves:
        feedback.settle(unit, half, merge.flatten(unit, half), None)
    for half in halves:
        assert torch.equal(feedback.owed(unit, half)[0], merge.flatten(unit, half))


def test_debts_of_another_shape_mean_nothing():
    like = {UNITS[0]: tensors(0, num_out=6)}
    sent, summed = owed(settled(), UNITS[:1], like)
    for vector, old in ((sent, SENT), (summed, SUMMED)):
        expected = {UNITS[0]: {"m.lora_A": old[UNITS[0]]["m.lora_A"], "m.lora_B": torch.zeros(6, 2)}}
        assert torch.equal(vector, merge.flatten(UNITS[:1], expected))


def test_who_took_anothers_state_owes_nothing_for_the_old_one():
    feedback = settled()
    feedback.forget([UNITS[0], unit_of("default", 9)])
    assert feedback.owed(UNITS[:1], LIKE) == (None, None)
    assert torch.equal(feedback.owed(UNITS[1:], LIKE)[0], merge.flatten(UNITS[1:], SENT))
    assert torch.equal(feedback.owed(UNITS[1:], LIKE)[1], merge.flatten(UNITS[1:], SUMMED))


def test_the_book_keeps_copies_and_gives_copies():
    feedback, vector = Feedback(), merge.flatten(UNITS, SENT)
    feedback.settle(UNITS, LIKE, vector, None)
    vector.zero_()
    given, _ = feedback.owed(UNITS, LIKE)
    assert torch.equal(given, merge.flatten(UNITS, SENT))
    given.zero_()
    assert torch.equal(feedback.owed(UNITS, LIKE)[0], merge.flatten(UNITS, SENT))


def test_who_counted_for_nothing_still_owes_what_it_owed_and_of_its_sums_what_is_new():
    feedback = settled()
    later = {unit: tensors(40 + block) for block, unit in enumerate(UNITS)}
    vector = merge.flatten(UNITS, later)
    feedback.settle(UNITS, LIKE, vector, vector, unheard={UNITS[1]})
    sent, summed = owed(feedback, UNITS)
    assert torch.equal(sent, merge.flatten(UNITS, later | {UNITS[1]: SENT[UNITS[1]]}))
    assert torch.equal(summed, vector)


def test_a_result_that_is_not_applied_after_all_leaves_the_older_debts():
    feedback = settled()
    vector = merge.flatten(UNITS, {unit: tensors(50) for unit in UNITS})
    feedback.settle(UNITS, LIKE, vector, vector)
    feedback.withdraw(UNITS[:2])
    for found, old in zip(owed(feedback, UNITS), (SENT, SUMMED), strict=True):
        assert torch.equal(found, merge.flatten(UNITS, old | {UNITS[2]: tensors(50)}))
    first = Feedback()
    first.settle(UNITS, LIKE, vector, None)
    first.withdraw(UNITS)
    assert first.owed(UNITS, LIKE) == (None, None)


def test_a_unit_that_was_not_in_the_round_that_is_withdrawn_keeps_its_debts():
    feedback = settled()
    feedback.begin()
    feedback.withdraw(UNITS)
    for found, old in zip(owed(feedback, UNITS), (SENT, SUMMED), strict=True):
        assert torch.equal(found, merge.flatten(UNITS, old))


@pytest.mark.parametrize(("samples", "is_heard"), [(0.0, False), (2.0, True)])
def test_a_round_in_which_a_peer_has_no_say_does_not_pay_what_it_owes(samples, is_heard):
    unit, ann, bob = unit_of("default", 0), PeerId("ann"), PeerId("bob")
    group = group_of(bring(ann, [0], samples), bring(bob, [0]))
    plan = planning.plan(group, ann, CONFIG)
    still = {name: torch.ones_like(tensor) for name, tensor in LIKE[unit].items()}
    view = UnitView(unit=unit, round=4, live=still, anchor=still, outer={}, scaling=1.0)
    work, feedback = RoundWork(UnitRules(Recipe()), plan, {unit: UnitInput(view=view)}, 5), Feedback()
    old, new = (merge.flatten([unit], {unit: tensors(seed)}) for seed in (1, 2))
    feedback.settle([unit], {unit: still}, old, None)
    [entry] = work.entries(feedback)
    assert entry.owed_sent is not None
    key = entry.unit_class.class_id
    reduced = {key: Reduced(mean=torch.zeros_like(old), digest=b"d", owed_sent=new)}
    work.take_means(reduced)
    work.finish(reduced, {key: Applied(b"d")}, {}, feedback)
    assert torch.equal(feedback.owed([unit], {unit: still})[0], new if is_heard else old)
