"""Frames on a stream: `u32 header length | msgpack header | tensor bytes`. Bounded before read, checked before use.

The header is `{q: request number, k: kind, b: body, t: [[dtype, shape], ...]}`; the tensors' bytes follow in order,
row-major, little-endian. Unknown keys of a body are ignored, so that later versions may add some.
"""

from __future__ import annotations

import asyncio
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgpack
import torch

from peers.errors import BadMessage, StreamClosed

MAX_HEADER_BYTES = 64 << 10
MAX_PAYLOAD_BYTES = 128 << 20
MAX_TENSORS = 2048
MAX_DIMENSIONS = 5
MAX_EXTENT = 1 << 27
WRITE_CHUNK_BYTES = 1 << 20
_LENGTH = struct.Struct(">I")

DTYPES: Mapping[str, torch.dtype] = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "i64": torch.int64,
    "i32": torch.int32,
    "u8": torch.uint8,
    "bool": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """One message as it travels: `request` joins an answer to its question; `body` is still unparsed."""

    request: int
    kind: str
    body: Mapping[str, object]
    tensors: tuple[torch.Tensor, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of tensor payload."""
        return sum(t.numel() * t.element_size() for t in self.tensors)


async def read_frame(reader: asyncio.StreamReader, *, max_payload: int = MAX_PAYLOAD_BYTES) -> Frame:
    """The next frame; its tensors are fresh memory.

    Raises:
        StreamClosed: the other side is gone.
        BadMessage: a length, the header, or a tensor's description cannot be right. Close the stream then.
    """
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if not 0 < length <= MAX_HEADER_BYTES:
            raise BadMessage(f"a frame header of {length} bytes is refused; at most {MAX_HEADER_BYTES} are read")
        header = _unpack(await reader.readexactly(length))
        request, kind, body, specs = _header_parts(header)
        sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in specs]
        if sum(sizes) > max_payload:
            raise BadMessage(f"tensors of {sum(sizes)} bytes are refused; at most {max_payload} are read")
        tensors = []
        for (dtype, shape), size in zip(specs, sizes, strict=True):
            tensors.append(_tensor(await reader.readexactly(size) if size else b"", dtype, shape))
    except (asyncio.IncompleteReadError, ConnectionError, BrokenPipeError) as error:
        raise StreamClosed("the other side closed the stream") from error
    return Frame(request=request, kind=kind, body=body, tensors=tuple(tensors))


async def write_frame(writer: asyncio.StreamWriter, frame: Frame) -> int:
    """Send one frame; returns the bytes written. One writer at a time per stream: the caller holds a lock.

    Raises:
        StreamClosed: the other side is gone.
        BadMessage: the frame is larger than any peer would read, or of a dtype that does not travel; nothing was sent.
    """
    if not all(t.dtype in _NAMES for t in frame.tensors):
        raise BadMessage(f"a tensor of {[str(t.dtype) for t in frame.tensors if t.dtype not in _NAMES]} cannot be sent")
    header = msgpack.packb(
        {
            "q": frame.request,
            "k": frame.kind,
            "b": dict(frame.body),
            "t": [[_NAMES[t.dtype], list(t.shape)] for t in frame.tensors],
        }
    )
    if len(header) > MAX_HEADER_BYTES or frame.num_bytes > MAX_PAYLOAD_BYTES:
        raise BadMessage(
            f"a message of {len(header)} + {frame.num_bytes} bytes is too large to send "
            f"(at most {MAX_HEADER_BYTES} + {MAX_PAYLOAD_BYTES}); use smaller microbatches"
        )
    try:
        writer.write(_LENGTH.pack(len(header)) + header)
        for tensor in frame.tensors:
            data = memoryview(_bytes(tensor))
            for offset in range(0, len(data), WRITE_CHUNK_BYTES):
                writer.write(data[offset : offset + WRITE_CHUNK_BYTES])
                await writer.drain()
        await writer.drain()
    except (ConnectionError, BrokenPipeError, RuntimeError) as error:  # uvloop: RuntimeError on a closed transport
        raise StreamClosed("the other side closed the stream") from error
    return _LENGTH.size + len(header) + frame.num_bytes


def check_finite(tensors: Sequence[torch.Tensor]) -> None:
    """Refuse NaN and infinity. Costs a pass over the values: call it off the event loop for large ones.

    Raises:
        BadMessage: a value is not finite.
    """
    for tensor in tensors:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise BadMessage("a tensor with values that are not finite was refused")


def _unpack(raw: bytes) -> object:
    try:
        return msgpack.unpackb(
            raw, max_str_len=8192, max_bin_len=MAX_HEADER_BYTES, max_array_len=MAX_TENSORS * 4, max_map_len=4096
        )
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise BadMessage("a frame header is not valid msgpack") from error


def _header_parts(header: object) -> tuple[int, str, Mapping[str, object], list[tuple[torch.dtype, tuple[int, ...]]]]:
    if not isinstance(header, dict):
        raise BadMessage("a frame header is not a map")
    request, kind, body, specs = (header.get(key) for key in "qkbt")
    if type(request) is not int or not 0 <= request < 1 << 53 or not isinstance(kind, str) or len(kind) > 32:
        raise BadMessage("a frame has no valid request number and kind")
    if not isinstance(body, dict) or not all(isinstance(key, str) for key in body) or not isinstance(specs, list):
        raise BadMessage(f"the {kind} frame has no valid body and tensor list")
    if len(specs) > MAX_TENSORS:
        raise BadMessage(f"{len(specs)} tensors in one frame are refused; at most {MAX_TENSORS}")
    return request, kind, body, [_spec(item) for item in specs]


def _spec(item: object) -> tuple[torch.dtype, tuple[int, ...]]:
    if not isinstance(item, list) or len(item) != 2 or not isinstance(item[1], list):
        raise BadMessage("a tensor description is malformed")
    dtype = DTYPES.get(item[0]) if isinstance(item[0], str) else None
    shape = tuple(item[1])
    if dtype is None or len(shape) > MAX_DIMENSIONS:
        raise BadMessage("a tensor of an unknown dtype or with too many dimensions was refused")
    whole = all(type(extent) is int and 0 <= extent <= MAX_EXTENT for extent in shape)
    if not whole or math.prod(max(1, extent) for extent in shape) > MAX_EXTENT:  # torch multiplies strides even of none
        raise BadMessage("a tensor's shape is malformed")
    return dtype, shape


def _tensor(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    if dtype is torch.bool:
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).ne(0).reshape(shape)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


def _bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().data) if flat.numel() else b""
