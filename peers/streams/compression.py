"""Activations and gradients in eight bits: small blocks, each with its own scale, and its largest value kept apart.

Blockwise absmax quantization as in "8-bit Optimizers via Block-wise Quantization" (Dettmers et al., arXiv:2110.02861),
which Petals (arXiv:2209.01188) uses for hidden states. Language models have a few channels that are hundreds of times
larger than all others ("LLM.int8()", arXiv:2208.07339); one of them would set the step of its whole block. So the
largest value of each block, its *peak*, travels apart in bf16, and the step follows the second largest. The peak's
place needs no index: it is marked by the code -128, which no other value has.

The blocks lie along the last dimension, so that no token's error depends on the tokens beside it. A tensor [..., D]
takes D + 4 * ceil(D / 64) bytes a row, 0.53 of bf16. Pure: no stream, no event loop.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from peers.errors import BadMessage

BLOCK = 64
MAX_MAGNITUDE = 2.0**126  # larger values are refused, so that what is decoded stays finite in fp32
_MAX_SCALE = 2.0**120
_LARGEST_CODE, _PEAK_CODE = 127, -128
_HEAD_BYTES = 2 * torch.bfloat16.itemsize  # of each block: peak and scale
_ROUND_UP = 1 + 2.0**-8  # more than bf16 loses, so that no value lies beyond 127 steps
_TINY = torch.finfo(torch.bfloat16).tiny
_SMALLEST_SHARE = 2.0**-100  # of the peak: what is smaller would overflow fp32 on the way to its code
_CHUNK_VALUES = 1 << 16  # worked on at once: they stay in the processor's cache


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Quantized:
    """A float tensor of `shape` [..., D]: int8 codes [rows, D], bf16 peaks and scales [rows, ceil(D / 64)]."""

    shape: tuple[int, ...]
    codes: torch.Tensor
    peaks: torch.Tensor
    scales: torch.Tensor

    @property
    def buffers(self) -> tuple[torch.Tensor, ...]:
        """What travels, in order."""
        return self.codes, self.peaks, self.scales


def quantized_bytes(shape: tuple[int, ...]) -> int:
    """The bytes that a tensor of `shape` takes; known before any of them is read."""
    rows, width = _rows(shape)
    return rows * (width + _num_blocks(width) * _HEAD_BYTES)


def quantize(tensor: torch.Tensor) -> Quantized:
    """A float tensor of any shape in eight bits.

    A value is off by at most half of its block's scale, which is the second largest magnitude of the block / 127 *
    1.006; a peak by 2**-8 of itself. Values below 2e-36, or below 2**-100 of their block's peak, become zero.

    Raises:
        BadMessage: a value is not finite or beyond 2**126, so no scale fits it.
    """
    rows, width = _rows(tuple(tensor.shape))
    values_RD = tensor.detach().to("cpu").reshape(rows, width)
    codes = torch.empty((rows, width), dtype=torch.int8)
    peaks = torch.empty((rows, _num_blocks(width)), dtype=torch.bfloat16)
    scales = torch.empty_like(peaks)
    for some in _chunks(rows, width):
        _quantize_rows(values_RD[some], codes[some], peaks[some], scales[some])
    return Quantized(shape=tuple(tensor.shape), codes=codes, peaks=peaks, scales=scales)


def dequantize(packed: Quantized) -> torch.Tensor:
    """The fp32 tensor that was quantized, nearly.

    Raises:
        BadMessage: a peak or a scale that no honest sender makes, or counts that do not fit the shape.
    """
    rows, width = _rows(packed.shape)
    heads = (rows, _num_blocks(width))
    if packed.codes.shape != (rows, width) or not packed.peaks.shape == packed.scales.shape == heads:
        raise BadMessage(f"an 8-bit tensor of shape {packed.shape} came with the wrong number of codes or scales")
    scales, peaks = packed.scales.float().unsqueeze(-1), packed.peaks.float().unsqueeze(-1)
    # Written so that NaN fails too.
    if not bool(((scales >= 0) & (scales <= _MAX_SCALE)).all()) or not bool((peaks.abs() <= MAX_MAGNITUDE).all()):
        raise BadMessage("an 8-bit tensor with a scale or peak that is negative, too large or not finite was refused")
    values_RD = torch.empty((rows, width), dtype=torch.float32)
    for some in _chunks(rows, width):
        codes = _blocked(packed.codes[some].float())
        # Arithmetic instead of masks and torch.where, which torch does ten times slower over small blocks.
        is_peak = (codes + _LARGEST_CODE).clamp_max_(0).neg_()
        blocks = codes.sub_(is_peak, alpha=_PEAK_CODE).mul_(scales[some]).addcmul_(is_peak, peaks[some])
        values_RD[some] = _unblocked(blocks, width)
    return values_RD.reshape(packed.shape)


def from_bytes(data: bytearray, shape: tuple[int, ...]) -> Quantized:
    """What arrived, `quantized_bytes(shape)` long.

    Raises:
        BadMessage: the number of bytes does not fit the shape.
    """
    rows, width = _rows(shape)
    if len(data) != quantized_bytes(shape):
        raise BadMessage(f"an 8-bit tensor of shape {shape} cannot have {len(data)} bytes")
    buffer = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    codes, heads = buffer[: rows * width], buffer[rows * width :]
    peaks, scales = heads.clone().view(torch.bfloat16).reshape(2, rows, _num_blocks(width))  # cloned: bf16 is aligned
    return Quantized(shape=shape, codes=codes.view(torch.int8).reshape(rows, width), peaks=peaks, scales=scales)


def _quantize_rows(values_RD: torch.Tensor, codes: torch.Tensor, peaks: torch.Tensor, scales: torch.Tensor) -> None:
    """Quantize some rows into the memory of their codes, peaks and scales."""
    blocks = _blocked(values_RD.float())
    high, low = blocks.amax(-1, keepdim=True), blocks.amin(-1, keepdim=True)
    peak = torch.where(-low > high, low, high)
    if not bool((peak.abs() <= MAX_MAGNITUDE).all()):  # a value that is not finite is the peak of its block
        raise BadMessage("a tensor with values that are not finite, or beyond 2**126, cannot be sent in 8 bits")
    shares = blocks / torch.where(peak == 0, 1.0, peak)  # of the peak; the peak itself is exactly 1
    is_peak = shares.clamp_min(0).floor_()
    shares.sub_(is_peak)
    second = torch.maximum(shares.amax(-1, keepdim=True), -shares.amin(-1, keepdim=True))
    scale = (second * peak.abs() * (_ROUND_UP / _LARGEST_CODE)).to(torch.bfloat16)
    scale = torch.where((second < _SMALLEST_SHARE) | (scale < _TINY), 0.0, scale)
    steps = torch.where(scale > 0, peak / scale.float(), 0.0)
    steps_of_values = shares.mul_(steps).round_().add_(is_peak, alpha=_PEAK_CODE)
    codes.copy_(_unblocked(steps_of_values, values_RD.shape[1]))
    peaks.copy_(peak.squeeze(-1))
    scales.copy_(scale.squeeze(-1))


def _rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and their width; a single number is one row of one."""
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def _num_blocks(width: int) -> int:
    return -(-width // BLOCK)


def _chunks(rows: int, width: int) -> Iterator[slice]:
    if width:
        step = max(1, _CHUNK_VALUES // width)
        yield from (slice(start, start + step) for start in range(0, rows, step))


def _blocked(rows: torch.Tensor) -> torch.Tensor:
    """[rows, D] as [rows, blocks, 64]; a last block that is short is filled up with zeros."""
    number, width = rows.shape
    padded = pad(rows, (0, -width % BLOCK)) if width % BLOCK else rows
    return padded.reshape(number, _num_blocks(width), BLOCK)


def _unblocked(blocks: torch.Tensor, width: int) -> torch.Tensor:
    """The reverse, [rows, D]."""
    return blocks.reshape(blocks.shape[0], blocks.shape[1] * BLOCK)[:, :width]
