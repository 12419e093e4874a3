"""What a text has put through one point of a chain: enough to bring a new host to where it stands."""

from __future__ import annotations

import torch

from peers.chains.history import History, StepInput

TEXT_BTD = torch.arange(2 * 6 * 3, dtype=torch.float32).reshape(2, 6, 3)
IDS_BT = torch.arange(6).expand(2, 6)


def fed(*steps: StepInput) -> History:
    history = History()
    for step in steps:
        history.add(step)
    return history


def part(begin: int, end: int, **changes: object) -> StepInput:
    return StepInput(
        hidden_BTD=TEXT_BTD[:, begin:end],
        position=begin,
        positions_BT=IDS_BT[:, begin:end],
        **changes,  # type: ignore[arg-type]
    )


def test_a_new_host_gets_all_before_the_last_step_to_replay() -> None:
    again = fed(part(0, 4), part(4, 6)).again(2)
    assert again is not None
    assert torch.equal(again.hidden_BTD, TEXT_BTD)
    assert again.positions_BT is not None
    assert torch.equal(again.positions_BT, IDS_BT)
    assert (again.position, again.replay, again.depth) == (0, 4, 2)


def test_hosts_that_have_it_get_the_last_step_alone() -> None:
    last = part(4, 6)
    again = fed(part(0, 4), last).again(0)
    assert again is not None
    assert torch.equal(again.hidden_BTD, last.hidden_BTD)
    assert (again.position, again.replay) == (4, 0)


def test_what_was_rolled_back_is_not_replayed() -> None:
    again = fed(part(0, 5), part(2, 3), part(3, 4)).again(1)
    assert again is not None
    assert torch.equal(again.hidden_BTD, TEXT_BTD[:, :4])
    assert again.replay == 3


def test_rows_are_replayed_in_their_new_order_and_reordered_only_where_they_are_old() -> None:
    history = fed(part(0, 4), part(4, 5, rows=(1, 1)))
    again = history.again(1)
    assert again is not None
    assert torch.equal(again.hidden_BTD[:, :4], TEXT_BTD[[1, 1], :4])
    assert again.here().rows is None
    assert again.passed_on().rows == (1, 1)


def test_a_replay_ends_at_the_last_new_host() -> None:
    again = fed(part(0, 4), part(4, 6)).again(2)
    assert again is not None
    second = again.out(again.hidden_BTD + 1).passed_on()
    assert (second.depth, second.replay, second.position) == (1, 4, 0)
    third = second.out(second.hidden_BTD).passed_on()
    assert (third.depth, third.replay, third.position) == (0, 0, 4)
    assert torch.equal(third.hidden_BTD, TEXT_BTD[:, 4:] + 1)
    assert third.positions_BT is not None
    assert torch.equal(third.positions_BT, IDS_BT[:, 4:])


def test_a_host_that_was_brought_up_by_a_replay_can_bring_up_the_next() -> None:
    again = fed(part(0, 4), part(4, 6)).again(1)
    assert again is not None
    behind = fed(again.out(again.hidden_BTD * 2)).again(1)
    assert behind is not None
    assert torch.equal(behind.hidden_BTD, TEXT_BTD * 2)
    assert (behind.replay, behind.position) == (4, 0)


def test_what_began_elsewhere_cannot_be_replayed_and_bytes_are_known() -> None:
    assert History().again(1) is None
    assert fed(part(4, 6)).again(1) is None
    assert fed(part(0, 4), part(4, 6)).num_bytes == TEXT_BTD.nbytes
