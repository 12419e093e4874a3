"""Which steps share a pass: every rule, on plain values."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocks.decoding.batching import BatchLimits, Pick, Turn, Waiting, choose, seconds_to_gather

LIMITS = BatchLimits(decode_tokens=4, decode_rows=6, chunk_tokens=32, idle_chunk_tokens=64, spare_tokens=0)


def step(
    ticket: int, tokens: int = 1, *, rows: int = 1, client: str = "ann", session: str = "", group: str = "0:4"
) -> Waiting:
    return Waiting(ticket=ticket, session=session or f"s{ticket}", client=client, group=group, rows=rows, tokens=tokens)


def tickets(waiting: list[Waiting], turn: Turn | None = None) -> list[int]:
    return [pick.ticket for pick in choose(waiting, turn or Turn(), LIMITS)[0]]


def test_nothing_waiting_is_no_pass_and_no_turn() -> None:
    assert choose([], Turn(passes=3), LIMITS) == ((), Turn(passes=3))


def test_all_that_decode_go_together() -> None:
    assert tickets([step(1), step(2), step(3, client="bob"), step(4, rows=2)]) == [1, 3, 2, 4]


def test_a_prompt_waits_while_others_decode_and_decoding_waits_for_one_chunk_of_it() -> None:
    waiting = [step(1), step(2, 100)]
    first, turn = choose(waiting, Turn(), LIMITS)
    second, turn = choose(waiting, turn, LIMITS)
    third, turn = choose(waiting, turn, LIMITS)
    assert first == third == (Pick(ticket=1, tokens=1),)
    assert second == (Pick(ticket=2, tokens=32),)


def test_a_prompt_takes_longer_chunks_when_nobody_has_decoded_for_a_while() -> None:
    prompt = [step(1, 100)]
    assert choose(prompt, Turn(), LIMITS)[0] == (Pick(ticket=1, tokens=64),)
    turn = Turn(passes=5, last_decoding=5)
    sizes = []
    for _ in range(4):
        picks, turn = choose(prompt, turn, LIMITS)
        sizes.append(picks[0].tokens)
    assert sizes == [32, 32, 32, 64]


def test_prompts_of_like_length_share_a_pass_and_others_wait() -> None:
    assert tickets([step(1, 20), step(2, 18), step(3, 5)]) == [1, 2]
    assert tickets([step(1, 60), step(2, 18)]) == [1]
    chunk, _ = choose([step(1, 200, rows=2), step(2, 90)], Turn(), LIMITS)
    assert chunk == (Pick(ticket=1, tokens=32),)


def test_chunks_of_long_prompts_share_a_pass_when_there_is_room_beside_them() -> None:
    roomy = BatchLimits(chunk_tokens=32, idle_chunk_tokens=64, decode_tokens=4, spare_tokens=0)
    picks, _ = choose([step(1, 30), step(2, 32), step(3, 30)], Turn(), roomy)
    assert [pick.ticket for pick in picks] == [1, 2]
    assert all(pick.tokens in (30, 32) for pick in picks)


def test_speculation_does_not_pad_everyone_to_its_length() -> None:
    assert tickets([step(1), step(2), step(3, 4)]) == [1, 2]
    assert tickets([step(3, 4), step(4, 3), step(5), step(6)]) == [3, 4, 5]


def test_guesses_ahead_share_a_pass_where_padding_costs_less_than_another_pass() -> None:
    limits = BatchLimits()
    guesses = limits.decode_tokens - 5
    picks, turn = choose([step(1, guesses), step(2, client="bob"), step(3), step(4)], Turn(), limits)
    assert [(pick.ticket, pick.tokens) for pick in picks] == [(1, guesses), (2, 1)]
    assert turn.last_decoding == turn.passes, "guesses count as decoding"
    picks, _ = choose([step(1, 5), step(2), step(3), step(4)], Turn(), limits)
    assert len(picks) == 4


def test_steps_of_other_spans_wait_for_a_pass_of_their_own() -> None:
    waiting = [step(1), step(2, group="4:8", client="bob"), step(3)]
    picks, turn = choose(waiting, Turn(), LIMITS)
    assert [pick.ticket for pick in picks] == [1, 3]
    assert tickets(waiting, turn) == [2]


def test_only_the_earliest_step_of_a_session_comes() -> None:
    assert tickets([step(2, session="x"), step(1, session="x"), step(3)]) == [1, 3]


def test_clients_take_turns_however_many_sessions_they_have() -> None:
    waiting = [step(ticket) for ticket in range(20)] + [step(ticket, client="bob") for ticket in (20, 21)]
    turn = Turn()
    picks, turn = choose(waiting, turn, LIMITS)
    assert [pick.ticket for pick in picks] == [0, 20, 1, 21, 2, 3]
    greedy = [step(ticket, 40) for ticket in range(5)] + [step(9, 40, client="bob")]
    order = []
    for _ in range(4):
        picks, turn = choose(greedy, turn, LIMITS)
        order.append(picks[0].ticket)
        greedy = [one for one in greedy if one.ticket != picks[0].ticket]
    assert order.index(9) <= 1


def test_a_step_larger_than_every_limit_still_gets_a_pass() -> None:
    assert tickets([step(1, rows=900)]) == [1]
    assert choose([step(1, 500, rows=900)], Turn(), LIMITS)[0] == (Pick(ticket=1, tokens=1),)


def test_the_turn_forgets_clients_that_wait_for_nothing() -> None:
    _, turn = choose([step(1, client="ann")], Turn(), LIMITS)
    _, turn = choose([step(2, client="bob")], turn, LIMITS)
    assert set(turn.last_of_client) == {"bob"}


def test_every_small_queue_is_served_whole_and_within_the_limits() -> None:
    shapes = [(1, 1), (2, 1), (1, 4), (1, 9), (2, 40)]
    for count in range(1, 5):
        for chosen in itertools.product(shapes, repeat=count):
            left = {
                at: step(at, tokens, rows=rows, client="ab"[at % 2], group="xy"[at // 2 % 2])
                for at, (rows, tokens) in enumerate(chosen)
            }
            turn, passes = Turn(), 0
            while left:
                waiting = list(left.values())
                picks, turn = choose(waiting, turn, LIMITS)
                passes += 1
                check_pass([left[pick.ticket] for pick in picks], picks)
                for pick in picks:
                    one = left.pop(pick.ticket)
                    if pick.tokens < one.tokens:
                        left[one.ticket] = step(
                            one.ticket, one.tokens - pick.tokens, rows=one.rows, client=one.client, group=str(one.group)
                        )
            assert passes <= 12


def check_pass(steps: list[Waiting], picks: tuple[Pick, ...]) -> None:
    rows = sum(one.rows for one in steps)
    true = sum(one.rows * pick.tokens for one, pick in zip(steps, picks, strict=True))
    padded = rows * max(pick.tokens for pick in picks)
    assert len({one.group for one in steps}) == 1
    assert len({pick.ticket for pick in picks}) == len(picks)
    assert all(1 <= pick.tokens <= one.tokens for one, pick in zip(steps, picks, strict=True))
    assert len(steps) == 1 or (padded <= LIMITS.padding * true and padded <= LIMITS.idle_chunk_tokens)
    assert len({one.tokens <= LIMITS.decode_tokens for one in steps}) == 1


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 80), st.sampled_from("abc")), min_size=1, max_size=12),
    st.integers(0, 9),
)
def test_any_queue_gives_a_pass_within_the_limits(drawn: list[tuple[int, int, str]], decoded: int) -> None:
    waiting = [step(at, tokens, rows=rows, client=client) for at, (rows, tokens, client) in enumerate(drawn)]
    picks, turn = choose(waiting, Turn(passes=9, last_decoding=decoded), LIMITS)
    check_pass([waiting[pick.ticket] for pick in picks], picks)
    assert turn.passes == 10


@pytest.mark.parametrize(
    ("now", "missing", "seconds"),
    [
        (10.0, [], 0.0),
        (10.0, [10.1], 1.0),  # soon: wait up to a quarter of a pass
        (10.4, [10.1], 0.6),  # a little late
        (10.0, [12.0], 0.0),  # too far away
        (10.9, [9.0], 0.0),  # gone
        (11.5, [11.0], 0.0),  # the wait is over
    ],
)
def test_a_pass_waits_a_moment_for_those_that_are_about_to_ask(
    now: float, missing: list[float], seconds: float
) -> None:
    assert seconds_to_gather(now, 10.0, missing, 4.0) == pytest.approx(seconds)


@pytest.mark.parametrize("wrong", [{"decode_rows": 0}, {"chunk_tokens": 0}, {"padding": 0.5}, {"idle_chunk_tokens": 1}])
def test_limits_without_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="use larger"):
        BatchLimits(**wrong)  # type: ignore[arg-type]
