"""Vectors of a round as bytes and back: exact, halves, blockwise 8 and 4 bits, the largest few. Pure.

All numbers are little endian, and equal vectors give equal bytes. Bytes come from strangers: `decode` checks their
length before anything else and allocates by the number of values that it was told, whatever the bytes say. How the
bytes travel, and which codec a run has, is decided elsewhere.
"""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from averaging.errors import BadTensors
from averaging.recipe import CODECS

"""The names that `make_codec` knows, from exact to coarse."""

Buffer = bytes | memoryview
"""Bytes that may lie in a message."""

_Floats = npt.NDArray[np.float32]
_LARGEST_HALF = 65504.0
_SMALLEST_NORMAL = np.float32(2.0**-126)
_LARGEST_FLOAT = float(np.finfo(np.float32).max)
_INFINITY_BITS = 0x7F800000  # fp32 bit patterns below this one are finite and not negative


class Codec(Protocol):
    """A flat fp32 CPU vector as bytes and back."""

    @property
    def name(self) -> str:
        """Tells wire formats apart: equal names and shares read each other's bytes."""

    @property
    def is_lossy(self) -> bool:
        """Whether decoding may give other values than were encoded."""

    def encode(self, vector: torch.Tensor) -> bytes:
        """The vector's bytes.

        Raises:
            BadTensors: the vector is not flat fp32 on the CPU, or not finite.
        """

    def decode(self, data: Buffer, num_values: int) -> torch.Tensor:
        """The flat fp32 vector of `num_values` finite values that `data` holds; it may lie in `data` itself, if that is
        memory to write in.

        Raises:
            BadTensors: `data` cannot have come from `encode` of such a vector.
        """

    def most_bytes(self, num_values: int) -> int:
        """The most that `encode` may give for so many values."""


def make_codec(name: str, *, top_share: float = 0.05, lossless: bool = False) -> Codec:
    """The codec of that name; `top_share` is what "topk" keeps, `lossless` adds zlib on top.

    Raises:
        ValueError: an unknown name, or a share outside of (0, 1].
    """
    if not 0 < top_share <= 1:
        raise ValueError(f"top_share is {top_share}; use more than 0 and at most 1")
    codec: Codec
    match name:
        case "fp32":
            codec = _Plain(name=name, is_lossy=False)
        case "fp16":
            codec = _Plain(name=name, is_lossy=True)
        case "int8":
            codec = _Blockwise(name=name, block_values=256, code_bits=8, scale_bytes=4)
        case "int4":
            # A bf16 scale has the range of fp32, so small blocks survive as they would not with fp16, at half the
            # bytes: with fp32 scales a vector would take 14.1% of its fp32 bytes instead of 13.3%.
            codec = _Blockwise(name=name, block_values=64, code_bits=4, scale_bytes=2)
        case "topk":
            codec = _Largest(share=top_share)
        case _:
            raise ValueError(f"no codec is called {name!r}; use one of {', '.join(CODECS)}")
    # Signs and exponents repeat and mantissas do not, so they compress better apart.
    return _Zipped(inner=codec, num_planes={"fp32": 4, "fp16": 2}.get(name, 1)) if lossless else codec


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plain:
    """Floats as they are, or as halves; what is larger than a half can hold becomes the largest half."""

    name: str
    is_lossy: bool

    def encode(self, vector: torch.Tensor) -> bytes:
        values = _values(vector)
        if self.is_lossy:
            halves = torch.from_numpy(values).clamp(-_LARGEST_HALF, _LARGEST_HALF).to(torch.float16)
            return halves.numpy().astype("<f2", copy=False).tobytes()
        return values.astype("<f4", copy=False).tobytes()

    def decode(self, data: Buffer, num_values: int) -> torch.Tensor:
        _check_length(data, self.name, num_values, self.most_bytes(num_values))
        if self.is_lossy:
            values = torch.from_numpy(np.frombuffer(data, "<f2").astype(np.float16)).float()
        else:
            values = torch.from_numpy(np.require(np.frombuffer(data, "<f4"), np.float32, ("W", "A")))
        _check_finite(values.numpy(), self.name)
        return values

    def most_bytes(self, num_values: int) -> int:
        return (2 if self.is_lossy else 4) * num_values


@dataclass(frozen=True, kw_only=True, slots=True)
class _Blockwise:
    """Small signed integers, with one scale for each block of values. Layout: all scales, then all codes.

    A scale is truncated so far that its product with any code is exact in fp32. So every machine decodes the same
    values, and encoding them again gives the same bytes. Blocks too small for a normal scale decode to 0.
    """

    name: str
    block_values: int
    code_bits: int
    scale_bytes: int
    is_lossy: bool = True

    def encode(self, vector: torch.Tensor) -> bytes:
        values = _values(vector)
        blocks = self._padded(values).reshape(-1, self.block_values)
        peaks = np.maximum(blocks.max(axis=1), -blocks.min(axis=1))
        scales = self._truncated(peaks / np.float32(self._most_code))
        scales[scales < _SMALLEST_NORMAL] = 0
        quotients = blocks / np.where(scales == 0, np.float32(1), scales)[:, None]
        codes = np.rint(quotients, out=quotients).astype(np.int8).reshape(-1)
        return self._scales_to_bytes(scales) + self._codes_to_bytes(codes, values.size)

    def decode(self, data: Buffer, num_values: int) -> torch.Tensor:
        _check_length(data, self.name, num_values, self.most_bytes(num_values))
        num_blocks = self._num_blocks(num_values)
        scales = self._scales_from_bytes(data, num_blocks)
        codes = self._codes_from_bytes(data, num_blocks * self.scale_bytes, num_values)
        if codes.min(initial=0) < -self._most_code:
            raise BadTensors(f"a code of {self.name} is out of range; the sender is broken or lies")
        values = np.zeros(num_blocks * self.block_values, np.float32)
        values[:num_values] = codes
        blocks = values.reshape(num_blocks, self.block_values)
        blocks *= scales[:, None]
        return torch.from_numpy(values[:num_values])

    def most_bytes(self, num_values: int) -> int:
        return self._num_blocks(num_values) * self.scale_bytes + _ceil_div(num_values * self.code_bits, 8)

    @property
    def _most_code(self) -> int:
        return (1 << (self.code_bits - 1)) - 1

    def _num_blocks(self, num_values: int) -> int:
        return _ceil_div(num_values, self.block_values)

    def _padded(self, values: _Floats) -> _Floats:
        missing = -values.size % self.block_values
        return np.concatenate([values, np.zeros(missing, np.float32)]) if missing else values

    def _truncated(self, scales: _Floats) -> _Floats:
        mask = np.uint32(0xFFFFFF00 if self.scale_bytes == 4 else 0xFFFF0000)
        return (scales.view(np.uint32) & mask).view(np.float32)

    def _scales_to_bytes(self, scales: _Floats) -> bytes:
        bits = scales.view(np.uint32)
        return (bits.astype("<u4") if self.scale_bytes == 4 else (bits >> 16).astype("<u2")).tobytes()

    def _scales_from_bytes(self, data: Buffer, num_blocks: int) -> _Floats:
        if self.scale_bytes == 4:
            bits = np.frombuffer(data, "<u4", num_blocks).astype(np.uint32)
        else:
            bits = np.frombuffer(data, "<u2", num_blocks).astype(np.uint32) << np.uint32(16)
        largest = self._truncated(np.array([_LARGEST_FLOAT], np.float32) / np.float32(self._most_code))
        # As unsigned integers, so that NaN, infinities and negative scales are all too large.
        if bits.max(initial=0) > largest.view(np.uint32)[0]:
            raise BadTensors(f"a scale of {self.name} is negative, not finite or too large; the sender has diverged")
        return bits.view(np.float32)

    def _codes_to_bytes(self, codes: npt.NDArray[np.int8], num_values: int) -> bytes:
        if self.code_bits == 8:
            return codes[:num_values].tobytes()
        nibbles = codes[: num_values + num_values % 2].view(np.uint8)
        return ((nibbles[0::2] & 15) | (nibbles[1::2] << 4)).tobytes()

    def _codes_from_bytes(self, data: Buffer, offset: int, num_values: int) -> npt.NDArray[np.int8]:
        if self.code_bits == 8:
            return np.frombuffer(data, np.int8, offset=offset) if num_values else np.zeros(0, np.int8)
        packed = np.frombuffer(data, np.uint8)[offset:]
        codes = np.empty(2 * packed.size, np.int8)
        codes[0::2] = (packed << 4).view(np.int8) >> 4  # shifting a signed byte to the right repeats its sign
        codes[1::2] = packed.view(np.int8) >> 4
        if codes[num_values:].any():
            raise BadTensors(f"bits beyond the last value of {self.name} are set; the sender is broken or lies")
        return codes[:num_values]


_TOP_HEADER = struct.Struct("<Bf")
_MASK, _GAPS = 0, 1
_LONG_GAP = 255
_LARGEST_KEPT = np.float32(2**15 - 16)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Largest:
    """The few values of largest magnitude, as halves of a common scale; all others are 0.

    Layout: how the places are written, the scale, the halves in order of place, the places. Places are a bit for
    each value, or the gaps before each kept one: a byte, where 255 means 255 and on to the next byte.
    """

    share: float
    name: str = "topk"
    is_lossy: bool = True

    def encode(self, vector: torch.Tensor) -> bytes:
        values = _values(vector)
        is_kept = _are_largest(np.abs(values), self._num_kept(values.size))
        kept = values[is_kept]
        _, exponent = math.frexp(float(np.abs(kept).max(initial=0)))
        # A power of two loses nothing; this one puts the largest value at the top of what halves can hold.
        scale = np.float32(2.0 ** max(exponent - 15, -126))
        # Below 2**15, as that would overflow for the very largest of fp32.
        halves = np.clip(kept / scale, -_LARGEST_KEPT, _LARGEST_KEPT).astype("<f2")
        marker, places = _places_to_bytes(is_kept)
        return _TOP_HEADER.pack(marker, scale) + halves.tobytes() + places

    def decode(self, data: Buffer, num_values: int) -> torch.Tensor:
        num_kept = self._num_kept(num_values)
        start = _TOP_HEADER.size + 2 * num_kept
        if not start <= len(data) <= self.most_bytes(num_values):
            raise BadTensors(f"{len(data)} bytes are not {num_values} values as {self.name}; the share may differ")
        marker, scale = _TOP_HEADER.unpack_from(data)
        halves = np.frombuffer(data, "<f2", num_kept, _TOP_HEADER.size)
        _check_finite(halves, self.name)
        most = float(np.abs(halves).max(initial=0))
        if not (0 <= scale <= _LARGEST_FLOAT and scale * most <= _LARGEST_FLOAT):
            raise BadTensors(f"a scale of {self.name} is negative, not finite or too large; the sender has diverged")
        values = np.zeros(num_values, np.float32)
        places = np.frombuffer(data, np.uint8)[start:]
        if marker == _MASK:
            values[_mask_from_bytes(places, num_values, num_kept)] = halves
        elif marker == _GAPS:
            values[_indices_from_gaps(places, num_values, num_kept)] = halves
        else:
            raise BadTensors(f"marker {marker} of {self.name} is unknown; the sender may run another version")
        values *= np.float32(scale)
        return torch.from_numpy(values)

    def most_bytes(self, num_values: int) -> int:
        num_kept = self._num_kept(num_values)
        place_bytes = min(_ceil_div(num_values, 8), num_kept + num_values // _LONG_GAP)
        return _TOP_HEADER.size + 2 * num_kept + place_bytes

    def _num_kept(self, num_values: int) -> int:
        return min(num_values, math.ceil(self.share * num_values))


_STORED, _DEFLATED = 0, 1


@dataclass(frozen=True, kw_only=True, slots=True)
class _Zipped:
    """Another codec's bytes, split into planes and deflated where that pays."""

    inner: Codec
    num_planes: int

    @property
    def name(self) -> str:
        return f"{self.inner.name}+zlib"

    @property
    def is_lossy(self) -> bool:
        return self.inner.is_lossy

    def encode(self, vector: torch.Tensor) -> bytes:
        plain = self.inner.encode(vector)
        planes = np.frombuffer(plain, np.uint8).reshape(-1, self.num_planes).T.tobytes()
        deflated = zlib.compress(planes, level=1)
        return bytes([_DEFLATED]) + deflated if len(deflated) < len(plain) else bytes([_STORED]) + plain

    def decode(self, data: Buffer, num_values: int) -> torch.Tensor:
        if not 1 <= len(data) <= self.most_bytes(num_values):
            raise BadTensors(f"{len(data)} bytes are not {num_values} values as {self.name}")
        if data[0] == _STORED:
            return self.inner.decode(data[1:], num_values)
        if data[0] != _DEFLATED:
            raise BadTensors(f"marker {data[0]} of {self.name} is unknown; the sender may run another version")
        return self.inner.decode(self._inflate(data, self.inner.most_bytes(num_values)), num_values)

    def most_bytes(self, num_values: int) -> int:
        return 1 + self.inner.most_bytes(num_values)

    def _inflate(self, data: Buffer, most_bytes: int) -> bytes:
        inflater = zlib.decompressobj()
        try:
            # One more than allowed: a limit of 0 would mean none, and the end shows only when there is room left.
            planes = inflater.decompress(memoryview(data)[1:], most_bytes + 1)
        except zlib.error as error:
            raise BadTensors(f"bytes of {self.name} do not inflate: {error}") from error
        if len(planes) > most_bytes or not inflater.eof or inflater.unused_data or len(planes) % self.num_planes:
            raise BadTensors(f"bytes of {self.name} inflate to a wrong length; the sender is broken or lies")
        return np.frombuffer(planes, np.uint8).reshape(self.num_planes, -1).T.tobytes()


def _values(vector: torch.Tensor) -> _Floats:
    if vector.dtype != torch.float32 or vector.device.type != "cpu" or vector.dim() != 1:
        raise BadTensors(f"codecs take flat float32 on the CPU, not {vector.dtype} of {vector.dim()} dimensions")
    values: _Floats = vector.detach().contiguous().numpy()
    if not _are_finite(values):
        raise BadTensors("the vector to encode holds values that are not finite; the step has diverged")
    return values


def _check_length(data: Buffer, name: str, num_values: int, num_bytes: int) -> None:
    if len(data) != num_bytes:
        raise BadTensors(f"{len(data)} bytes are not {num_values} values as {name}, which take {num_bytes}")


def _are_finite(values: npt.NDArray[np.floating]) -> bool:
    """By the sum, which is faster than a mask; one that overflows says nothing."""
    with np.errstate(all="ignore"):
        return math.isfinite(values.sum(dtype=np.float32)) or bool(np.isfinite(values).all())


def _check_finite(values: npt.NDArray[np.floating], name: str) -> None:
    if not _are_finite(values):
        raise BadTensors(f"bytes of {name} hold values that are not finite; the sender has diverged")


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _are_largest(magnitudes: _Floats, num_kept: int) -> npt.NDArray[np.bool_]:
    """True at the `num_kept` largest; of equal ones, at those that come first."""
    if num_kept == magnitudes.size:
        return np.ones(num_kept, np.bool_)
    place = magnitudes.size - num_kept
    threshold = np.partition(magnitudes, place)[place]
    is_kept: npt.NDArray[np.bool_] = magnitudes > threshold
    is_kept[np.flatnonzero(magnitudes == threshold)[: num_kept - np.count_nonzero(is_kept)]] = True
    return is_kept


def _places_to_bytes(is_kept: npt.NDArray[np.bool_]) -> tuple[int, bytes]:
    mask = np.packbits(is_kept, bitorder="little")
    indices = np.flatnonzero(is_kept)
    num_long, rest = np.divmod(np.diff(indices, prepend=-1) - 1, _LONG_GAP)
    ends = np.cumsum(num_long + 1)
    if not indices.size or ends[-1] >= mask.size:
        return _MASK, mask.tobytes()
    gaps = np.full(ends[-1], _LONG_GAP, np.uint8)
    gaps[ends - 1] = rest
    return _GAPS, gaps.tobytes()


def _mask_from_bytes(places: npt.NDArray[np.uint8], num_values: int, num_kept: int) -> npt.NDArray[np.bool_]:
    if places.size == _ceil_div(num_values, 8):
        bits = np.unpackbits(places, bitorder="little")
        if np.count_nonzero(bits) == num_kept and not bits[num_values:].any():
            return bits[:num_values].view(np.bool_)
    raise BadTensors(f"the bits of topk do not mark {num_kept} of {num_values} values; the sender is broken or lies")


def _indices_from_gaps(places: npt.NDArray[np.uint8], num_values: int, num_kept: int) -> npt.NDArray[np.int64]:
    # Only where it saves bytes, as `encode` does: that bounds the memory for the sums.
    if num_kept and num_kept <= places.size < _ceil_div(num_values, 8) and places[-1] != _LONG_GAP:
        is_end = places != _LONG_GAP
        if np.count_nonzero(is_end) == num_kept:
            indices: npt.NDArray[np.int64] = np.cumsum(places, dtype=np.int64)[is_end] + np.arange(
                num_kept
            )  # so they strictly increase
            if indices[-1] < num_values:
                return indices
    raise BadTensors(f"the gaps of topk do not lead to {num_kept} of {num_values} values; the sender is broken or lies")
