"""Fields that records have and messages do not: text that is shown to people, and numbers from a range."""

from __future__ import annotations

import re

from peers.streams.fields import Codec


def matching(expected: str, pattern: str, most: int) -> Codec[str]:
    """Text of at most `most` characters, all of which `pattern` describes."""

    compiled = re.compile(pattern)

    def read(value: object) -> str:
        if not isinstance(value, str) or len(value) > most or compiled.fullmatch(value) is None:
            raise ValueError
        return value

    return Codec(expected, read, str)


def number(low: float, high: float) -> Codec[float]:
    """A number in `[low, high]`."""

    def read(value: object) -> float:
        if type(value) not in (int, float) or not low <= value <= high:  # type: ignore[operator]
            raise ValueError  # a nan compares false, so it ends here too
        return float(value)  # type: ignore[arg-type]

    return Codec(f"a number from {low:g} to {high:g}", read, float)


def printable(most: int) -> Codec[str]:
    """Text without control characters: it ends up in other people's terminals."""

    def read(value: object) -> str:
        if not isinstance(value, str) or len(value) > most or not (value.isprintable() or not value):
            raise ValueError
        return value

    return Codec(f"printable text of at most {most} characters", read, str)
