"""One message of an all-reduce: a few bytes of header and a part's values, written once however many peers get them.

hivemind's streams take anything that writes and reads itself as its protobuf messages do. Those copy the values three
times on the way out and twice on the way in: about a tenth of a round's CPU.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

_HEADER = struct.Struct("<HBB")
_MOST_NAME_BYTES = 64
MALFORMED = 0xFFFF


@dataclass(slots=True)
class PartMessage:
    """A code of hivemind's averaging protocol, and what belongs to it.

    What a holder gives names its `group_id`, CANCELLED the `culprit`; parts and sums have `values`, in the run's
    codec. What cannot be read has the code MALFORMED, which no peer sends and every reader refuses.
    """

    code: int = MALFORMED
    group_id: bytes = b""
    culprit: bytes = b""
    values: bytes | memoryview = b""
    _written: bytes | bytearray = field(default=b"", repr=False)

    @classmethod
    def written(cls, code: int, values: bytes, *, group_id: bytes = b"") -> PartMessage:
        """A part, ready to be sent. For a worker thread: the loop then only hands on its bytes."""
        message = cls(code, group_id=group_id, values=values)
        message.SerializeToString()
        return message

    def SerializeToString(self) -> bytes | bytearray:  # noqa: N802  hivemind calls it by this name
        """The message as bytes; written once, so it must not change any more."""
        if not self._written:
            header = _HEADER.pack(self.code, len(self.group_id), len(self.culprit))
            self._written = b"".join((header, self.group_id, self.culprit, self.values))
            self.values = memoryview(self._written)[len(self._written) - len(self.values) :]  # frees the first copy
        return self._written

    def ParseFromString(self, data: bytes | bytearray) -> None:  # noqa: N802
        """Read what a peer sent; `values` stays a view of it."""
        if len(data) < _HEADER.size:
            return
        code, *lengths = _HEADER.unpack_from(data)
        middle = _HEADER.size + lengths[0]
        end = middle + lengths[1]
        if max(lengths) > _MOST_NAME_BYTES or end > len(data):
            return
        self.code, self.group_id, self.culprit = code, bytes(data[_HEADER.size : middle]), bytes(data[middle:end])
        self.values, self._written = memoryview(data)[end:], data

    @property
    def num_bytes(self) -> int:
        """Its size on the wire."""
        return len(self.SerializeToString())
