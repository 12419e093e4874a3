"""Values from Python are held to a kind and a range, and messages show whatever was given in one line."""

from __future__ import annotations

import math

import numpy as np
import pytest

from blocks.checks import check_number, check_whole, shown


class Refusal(Exception):
    pass


class Rude:
    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize("value", [1, 7, np.int64(3)])
def test_whole_numbers_in_range_pass(value: object) -> None:
    check_whole(Refusal, "count", value, 1, 7)


@pytest.mark.parametrize("value", [0, 8, True, 1.0, 1.5, math.nan, "3", None, [3], 10**400, np.bool_(True)])
def test_all_else_is_no_whole_number(value: object) -> None:
    with pytest.raises(Refusal, match=r"^count is .*; use a whole number from 1 to 7$"):
        check_whole(Refusal, "count", value, 1, 7)


@pytest.mark.parametrize("value", [0, 0.5, 2, np.float32(1.5)])
def test_numbers_in_range_pass(value: object) -> None:
    check_number(Refusal, "share", value, 0, 2)


@pytest.mark.parametrize("value", [-1e-9, 2.1, math.nan, math.inf, True, "0.5", None, 10**400])
def test_all_else_is_no_number(value: object) -> None:
    with pytest.raises(Refusal, match=r"^share is .*; use a number from 0 to 2$"):
        check_number(Refusal, "share", value, 0, 2)


def test_infinity_is_a_number_only_where_there_is_no_bound() -> None:
    check_number(Refusal, "seconds", math.inf, 0)
    with pytest.raises(Refusal, match=r"^seconds is nan; use a number of 0 or more$"):
        check_number(Refusal, "seconds", math.nan, 0)


@pytest.mark.parametrize("value", ["two\nlines", np.zeros((9, 9)), 10**5000, Rude(), "x" * 1000], ids=range(5))
def test_what_is_shown_is_one_short_line(value: object) -> None:
    text = shown(value)
    assert 0 < len(text) <= 80
    assert "\n" not in text
