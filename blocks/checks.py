"""Values that a person gives from Python, held to a kind and a range. Pure; who takes one says which error it is."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import NoReturn, cast


def shown(value: object, most: int = 80) -> str:
    """`value` as code writes it, in one line of at most `most` characters: for messages, of whatever was given."""
    try:
        text = repr(value)
    except Exception:  # an integer of thousands of digits, or somebody's own __repr__
        text = f"a {type(value).__name__}"
    return " ".join(text.split())[:most]


def is_unicode(text: str) -> bool:
    """Whether `text` has no lone halves of characters: JSON and command lines can hold those, tokenizers cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def refuse(error: type[Exception], name: str, value: object, use: str) -> NoReturn:
    """Raise `error`: what `name` is, and what to `use` instead."""
    raise error(f"{name} is {shown(value)}; use {use}")


def check_whole(error: type[Exception], name: str, value: object, low: int, high: float = math.inf) -> None:
    """Refuse all but whole numbers from `low` to `high`; true and false are none.

    Raises:
        error: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
        refuse(error, name, value, f"a whole number {_range(low, high)}")


def check_number(error: type[Exception], name: str, value: object, low: float, high: float = math.inf) -> None:
    """Refuse all but numbers from `low` to `high`, NaN too; infinity is one where `high` is.

    Raises:
        error: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= cast(float, value) <= high:
        refuse(error, name, value, f"a number {_range(low, high)}")


def check_kind(error: type[Exception], name: str, value: object, kind: type | tuple[type, ...], use: str) -> None:
    """Refuse what is not of a kind; `use` says in words what is.

    Raises:
        error: it is something else.
    """
    if not isinstance(value, kind):
        refuse(error, name, value, use)


def _range(low: float, high: float) -> str:
    return f"of {_bound(low)} or more" if math.isinf(high) else f"from {_bound(low)} to {_bound(high)}"


def _bound(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"
