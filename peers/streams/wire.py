"""Frames on a stream: `u32 header length | msgpack header | tensor bytes`. Bounded before read, checked before use.

The header is `{q: request number, k: kind, b: body, t: [[encoding, shape], ...]}`; the tensors' bytes follow in order,
row-major, little-endian. An encoding is a dtype's name, or `q8b64` for a float tensor in eight bits (compression.py).
`w` in a header, if there, is the format that the sender wants float tensors of the answer in. Unknown keys of a header
or body are ignored, so that later versions may add some.
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
from peers.streams.compression import Quantized, dequantize, from_bytes, quantize, quantized_bytes
from peers.streams.wire_format import WireFormat

MAX_HEADER_BYTES = 64 << 10
MAX_PAYLOAD_BYTES = 128 << 20
MAX_TENSORS = 2048
MAX_DIMENSIONS = 5
MAX_EXTENT = 1 << 27
WRITE_CHUNK_BYTES = 1 << 20
OFF_LOOP_BYTES = 256 << 10  # below this a pass over the values on the loop is cheaper than a hop to a thread
EIGHT_BIT = "q8b64"
_USUAL_HEADER_BYTES = 256
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
    """One message as it travels: `request` joins an answer to its question; `body` is still unparsed.

    Its float tensors travel in the format `wire` (None: as they are), and so should those of the answer. `wire_bytes`
    is what a frame that was read took on the stream.
    """

    request: int
    kind: str
    body: Mapping[str, object]
    tensors: tuple[torch.Tensor, ...] = ()
    wire: WireFormat | None = None
    wire_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors in memory."""
        return sum(t.numel() * t.element_size() for t in self.tensors)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Spec:
    """One tensor as the header describes it."""

    encoding: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """In memory."""
        return torch.float32 if self.encoding == EIGHT_BIT else DTYPES[self.encoding]

    @property
    def wire_bytes(self) -> int:
        """On the stream."""
        return quantized_bytes(self.shape) if self.encoding == EIGHT_BIT else self.memory_bytes

    @property
    def memory_bytes(self) -> int:
        """Once it is read; what the bounds hold, as eight bits become four bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


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
        request, kind, body, wire, specs = _header_parts(header)
        needed = sum(spec.memory_bytes for spec in specs)
        if needed > max_payload:
            raise BadMessage(f"tensors of {needed} bytes are refused; at most {max_payload} are read")
        tensors = []
        for spec in specs:
            tensors.append(await _tensor(await reader.readexactly(spec.wire_bytes) if spec.wire_bytes else b"", spec))
    except (asyncio.IncompleteReadError, ConnectionError, BrokenPipeError) as error:
        raise StreamClosed("the other side closed the stream") from error
    wire_bytes = _LENGTH.size + length + sum(spec.wire_bytes for spec in specs)
    return Frame(request=request, kind=kind, body=body, tensors=tuple(tensors), wire=wire, wire_bytes=wire_bytes)


def sent_bytes(tensors: Sequence[torch.Tensor], wire: WireFormat | None) -> int:
    """What a frame of these tensors takes on a stream in the format `wire`, with a usual header."""
    return _USUAL_HEADER_BYTES + sum(_sent_bytes(tensor, wire) for tensor in tensors)


async def write_frame(writer: asyncio.StreamWriter, frame: Frame) -> int:
    """Send one frame; returns the bytes written. One writer at a time per stream: the caller holds a lock.

    Raises:
        StreamClosed: the other side is gone.
        BadMessage: the frame is larger than any peer would read, of a dtype that does not travel, or holds values that
            do not fit in eight bits; nothing was sent.
    """
    if not all(t.dtype in _NAMES for t in frame.tensors):
        raise BadMessage(f"a tensor of {[str(t.dtype) for t in frame.tensors if t.dtype not in _NAMES]} cannot be sent")
    specs, buffers = await _outgoing(frame)
    described = [[spec.encoding, list(spec.shape)] for spec in specs]
    wanted = {} if frame.wire is None else {"w": str(frame.wire)}
    header = msgpack.packb({"q": frame.request, "k": frame.kind, "b": dict(frame.body), "t": described} | wanted)
    needed = sum(spec.memory_bytes for spec in specs)
    if len(header) > MAX_HEADER_BYTES or needed > MAX_PAYLOAD_BYTES:
        raise BadMessage(
            f"a message of {len(header)} + {needed} bytes is too large to send "
            f"(at most {MAX_HEADER_BYTES} + {MAX_PAYLOAD_BYTES}); use smaller microbatches"
        )
    try:
        writer.write(_LENGTH.pack(len(header)) + header)
        for buffer in buffers:
            data = memoryview(_bytes(buffer))
            for offset in range(0, len(data), WRITE_CHUNK_BYTES):
                writer.write(data[offset : offset + WRITE_CHUNK_BYTES])
                await writer.drain()
        await writer.drain()
    except (ConnectionError, BrokenPipeError, RuntimeError) as error:  # uvloop: RuntimeError on a closed transport
        raise StreamClosed("the other side closed the stream") from error
    return _LENGTH.size + len(header) + sum(spec.wire_bytes for spec in specs)


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


def _header_parts(header: object) -> tuple[int, str, Mapping[str, object], WireFormat | None, list[_Spec]]:
    if not isinstance(header, dict):
        raise BadMessage("a frame header is not a map")
    request, kind, body, specs = (header.get(key) for key in "qkbt")
    if type(request) is not int or not 0 <= request < 1 << 53 or not isinstance(kind, str) or len(kind) > 32:
        raise BadMessage("a frame has no valid request number and kind")
    if not isinstance(body, dict) or not all(isinstance(key, str) for key in body) or not isinstance(specs, list):
        raise BadMessage(f"the {kind} frame has no valid body and tensor list")
    if len(specs) > MAX_TENSORS:
        raise BadMessage(f"{len(specs)} tensors in one frame are refused; at most {MAX_TENSORS}")
    wire = header.get("w")
    if wire is not None and wire not in list(WireFormat):
        raise BadMessage(
            f"the {kind} frame wants an unknown format of tensors; the other peer may be newer, update this one"
        )
    return request, kind, body, None if wire is None else WireFormat(wire), [_spec(item) for item in specs]


def _spec(item: object) -> _Spec:
    if not isinstance(item, list) or len(item) != 2 or not isinstance(item[1], list):
        raise BadMessage("a tensor description is malformed")
    encoding, shape = item[0], tuple(item[1])
    known = isinstance(encoding, str) and (encoding in DTYPES or encoding == EIGHT_BIT)
    if not known or len(shape) > MAX_DIMENSIONS:
        raise BadMessage("a tensor of an unknown dtype or with too many dimensions was refused")
    whole = all(type(extent) is int and 0 <= extent <= MAX_EXTENT for extent in shape)
    if not whole or math.prod(max(1, extent) for extent in shape) > MAX_EXTENT:  # torch multiplies strides even of none
        raise BadMessage("a tensor's shape is malformed")
    return _Spec(encoding=encoding, shape=shape)


async def _tensor(data: bytes, spec: _Spec) -> torch.Tensor:
    if not data:
        return torch.empty(spec.shape, dtype=spec.dtype)
    buffer = bytearray(data)
    if spec.encoding == EIGHT_BIT:
        if spec.memory_bytes > OFF_LOOP_BYTES:
            return await asyncio.to_thread(lambda: dequantize(from_bytes(buffer, spec.shape)))
        return dequantize(from_bytes(buffer, spec.shape))
    if spec.dtype is torch.bool:
        return torch.frombuffer(buffer, dtype=torch.uint8).ne(0).reshape(spec.shape)
    return torch.frombuffer(buffer, dtype=spec.dtype).reshape(spec.shape)


async def _outgoing(frame: Frame) -> tuple[list[_Spec], list[torch.Tensor]]:
    """What the header says of a frame's tensors, and the memory that is sent."""
    if frame.wire is not None and frame.num_bytes > OFF_LOOP_BYTES:
        encoded = await asyncio.to_thread(lambda: [_encoded(tensor, frame.wire) for tensor in frame.tensors])
    else:
        encoded = [_encoded(tensor, frame.wire) for tensor in frame.tensors]
    specs: list[_Spec] = []
    buffers: list[torch.Tensor] = []
    for tensor in encoded:
        if isinstance(tensor, Quantized):
            specs.append(_Spec(encoding=EIGHT_BIT, shape=tensor.shape))
            buffers.extend(tensor.buffers)
        else:
            specs.append(_Spec(encoding=_NAMES[tensor.dtype], shape=tuple(tensor.shape)))
            buffers.append(tensor)
    return specs, buffers


def _encoded(tensor: torch.Tensor, wire: WireFormat | None) -> torch.Tensor | Quantized:
    if not tensor.is_floating_point():
        return tensor
    match wire:
        case WireFormat.BF16:
            return tensor.to(torch.bfloat16)
        case WireFormat.EIGHT_BIT:
            return quantize(tensor)
        case _:
            return tensor


def _sent_bytes(tensor: torch.Tensor, wire: WireFormat | None) -> int:
    if tensor.is_floating_point() and wire is WireFormat.EIGHT_BIT:
        return quantized_bytes(tuple(tensor.shape))
    narrow = tensor.is_floating_point() and wire is WireFormat.BF16
    return tensor.numel() * (2 if narrow else tensor.element_size())


def _bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().data) if flat.numel() else b""
