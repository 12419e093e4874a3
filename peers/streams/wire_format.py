"""In which form activations and gradients travel: chosen by whoever starts the work, kept by everyone it passes."""

from __future__ import annotations

from enum import StrEnum


class WireFormat(StrEnum):
    """What float tensors become on a stream; all others travel as they are.

    FP32 sends the values as they were computed, BF16 rounds them (half the bytes of fp32), EIGHT_BIT quantizes them in
    blocks (compression.py; a quarter of the bytes). `examples/benchmarks/wire.py` measures what they do to loss,
    gradients and text.
    """

    FP32 = "fp32"
    BF16 = "bf16"
    EIGHT_BIT = "8bit"
