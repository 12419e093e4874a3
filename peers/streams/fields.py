"""Fields of messages from outside: each has a codec that reads a plain value or refuses it, and writes it back.

A message is a frozen dataclass whose fields carry codecs (`wired(...)`); `to_body` and `from_body` do the rest.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from peers.errors import BadMessage

T = TypeVar("T")
_CODEC = "codec"


@dataclass(frozen=True, slots=True)
class Codec(Generic[T]):
    """How one field travels. `read` raises ValueError for a value that is not `expected`."""

    expected: str
    read: Callable[[object], T]
    write: Callable[[T], object]


def wired(codec: Codec[T], **default: T) -> T:
    """A dataclass field that travels; `default=` as in dataclasses.field, and then it may be absent."""
    return cast(T, dataclasses.field(metadata={_CODEC: codec}, **default))  # type: ignore[call-overload]


def to_body(message: object) -> dict[str, object]:
    """The fields of a message as plain values for msgpack."""
    values: dict[str, object] = {}
    for field in dataclasses.fields(cast(Any, message)):
        codec: Codec[object] = field.metadata[_CODEC]
        values[field.name] = codec.write(getattr(message, field.name))
    return values


def from_body(message_type: type[T], kind: str, body: Mapping[str, object]) -> T:
    """A message from plain values.

    Raises:
        BadMessage: a field is missing, of the wrong type or out of bounds; names message and field.
    """
    values: dict[str, object] = {}
    for field in dataclasses.fields(cast(Any, message_type)):
        codec: Codec[object] = field.metadata[_CODEC]
        if field.name not in body:
            if field.default is dataclasses.MISSING:
                raise BadMessage(f"{kind}: field '{field.name}' is missing")
            continue
        try:
            values[field.name] = codec.read(body[field.name])
        except ValueError as error:
            raise BadMessage(f"{kind}: field '{field.name}' is not {codec.expected}") from error
    return message_type(**values)


def integer(low: int, high: int) -> Codec[int]:
    """A whole number in `[low, high]`."""

    def read(value: object) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError
        return value

    return Codec(f"a whole number from {low} to {high}", read, lambda value: value)


def _read_number(value: object) -> float:
    if (type(value) is not int and type(value) is not float) or not math.isfinite(value):
        raise ValueError
    return float(value)


def _read_boolean(value: object) -> bool:
    if type(value) is not bool:
        raise ValueError
    return value


NUMBER: Codec[float] = Codec("a finite number", _read_number, float)
BOOLEAN: Codec[bool] = Codec("true or false", _read_boolean, bool)


def text(most: int) -> Codec[str]:
    """Text of at most `most` characters; what is longer is cut when sent and refused when read."""

    def read(value: object) -> str:
        if not isinstance(value, str) or len(value) > most:
            raise ValueError
        return value

    return Codec(f"text of at most {most} characters", read, lambda value: str(value)[:most])


def raw(most: int) -> Codec[bytes]:
    """At most `most` bytes."""

    def read(value: object) -> bytes:
        if not isinstance(value, bytes) or len(value) > most:
            raise ValueError
        return value

    return Codec(f"at most {most} bytes", read, lambda value: value)


def exactly(size: int) -> Codec[bytes]:
    """So many bytes."""

    def read(value: object) -> bytes:
        if not isinstance(value, bytes) or len(value) != size:
            raise ValueError
        return value

    return Codec(f"{size} bytes", read, lambda value: value)


def several(item: Codec[T], most: int) -> Codec[tuple[T, ...]]:
    """A list of at most `most` values of one codec."""

    def read(value: object) -> tuple[T, ...]:
        if not isinstance(value, list) or len(value) > most:
            raise ValueError
        return tuple(item.read(entry) for entry in value)

    return Codec(f"a list of at most {most}, each {item.expected}", read, lambda v: [item.write(entry) for entry in v])


def optional(item: Codec[T]) -> Codec[T | None]:
    """A value of the codec, or nothing."""
    return Codec(
        f"nothing, or {item.expected}",
        lambda value: None if value is None else item.read(value),
        lambda value: None if value is None else item.write(value),
    )
