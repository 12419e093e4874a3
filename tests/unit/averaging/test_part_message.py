"""Messages of an all-reduce: what is written is read, and what cannot be read is refused and not guessed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from averaging.part_message import MALFORMED, PartMessage

NAMES = st.binary(max_size=64)


def read(data: bytes) -> PartMessage:
    message = PartMessage()
    message.ParseFromString(data)
    return message


@given(st.integers(0, 0xFFFE), NAMES, NAMES, st.binary(max_size=200))
def test_what_is_written_is_read(code: int, group_id: bytes, culprit: bytes, values: bytes):
    written = PartMessage(code, group_id=group_id, culprit=culprit, values=values)
    found = read(written.SerializeToString())
    assert (found.code, found.group_id, found.culprit) == (code, group_id, culprit)
    assert bytes(found.values) == values == bytes(written.values)
    assert found.num_bytes == written.num_bytes == len(written.SerializeToString())


@given(st.binary(max_size=80))
def test_random_bytes_are_a_message_that_writes_itself_as_they_are_or_malformed(data: bytes):
    found = read(data)
    assert found.code == MALFORMED or found.SerializeToString() == data


@pytest.mark.parametrize(
    "data",
    [b"", b"\x01\x00\x00", b"\x01\x00\x05\x00abc", b"\x01\x00\x00\x02x", b"\x01\x00\x41\x00" + bytes(65)],
    ids=["empty", "half a header", "short group", "short culprit", "long group"],
)
def test_what_is_cut_short_or_claims_too_much_is_malformed(data: bytes):
    found = read(data)
    assert (found.code, found.group_id, bytes(found.values)) == (MALFORMED, b"", b"")


def test_values_are_written_once_and_kept_in_the_message():
    message = PartMessage(1, values=b"values")
    assert message.SerializeToString() is message.SerializeToString()
    assert isinstance(message.values, memoryview)
    assert message.values.obj is message.SerializeToString()
