"""Eight bits instead of sixteen: how far off, and what hostile scales do."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peers.errors import BadMessage
from peers.streams.compression import BLOCK, MAX_MAGNITUDE, Quantized, dequantize, from_bytes, quantize, quantized_bytes


def largest_error_allowed(row: torch.Tensor) -> torch.Tensor:
    """Half a step, which is 1/127 of the second largest magnitude of a value's block; for a peak its own rounding."""
    allowed = torch.empty_like(row)
    for start in range(0, len(row), BLOCK):
        block = row[start : start + BLOCK]
        ordered = block.abs().sort(descending=True).values
        second = ordered[1] if len(ordered) > 1 else torch.tensor(0.0)
        allowed[start : start + BLOCK] = second / 127 * 1.006 / 2 * 1.001 + 2.4e-36 + ordered[0] * 2.0**-100
        allowed[start + int(block.abs().argmax())] = ordered[0] * 2.0**-8 + 1e-37
    return allowed


def there_and_back(tensor: torch.Tensor) -> torch.Tensor:
    packed = quantize(tensor)
    data = bytearray(b"".join(buffer.view(torch.uint8).numpy().tobytes() for buffer in packed.buffers))
    assert len(data) == quantized_bytes(tuple(tensor.shape))
    return dequantize(from_bytes(data, tuple(tensor.shape)))


_SMALL = st.floats(-4, 4, width=32) | st.sampled_from([0.0, 1e-38, -7.5, 9000.0])
_NUMBERS = st.floats(-(2.0**125), 2.0**125, width=32) | _SMALL


@given(st.lists(_NUMBERS, min_size=1, max_size=150))
def test_no_value_is_further_off_than_half_a_step_of_its_block(values: list[float]) -> None:
    row = torch.tensor(values)
    back = there_and_back(row)
    assert back.dtype == torch.float32
    assert bool(((back - row).abs() <= largest_error_allowed(row)).all()), (back - row, largest_error_allowed(row))


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 0, 4), (0, 3), (3, 0), (4, 8), (7, 65), (2, 3, 576), (300, 512)])
def test_every_shape_comes_back_in_the_announced_number_of_bytes(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    back = there_and_back(tensor)
    assert back.shape == tensor.shape
    if tensor.numel():
        assert float((back - tensor).abs().max()) <= float(tensor.abs().max()) / 250


def test_a_channel_that_is_far_larger_than_the_others_does_not_blur_them() -> None:
    rows = torch.randn(50, 2 * BLOCK)
    loud = rows.clone()
    loud[:, 17] = 20_000.0  # as in language models
    others = [channel for channel in range(BLOCK) if channel != 17]
    error = (there_and_back(loud) - loud)[:, others].norm() / loud[:, others].norm()
    assert float(error) < 0.01
    assert float((there_and_back(loud)[:, 17] / 20_000 - 1).abs().max()) < 2**-8


def test_a_token_does_not_depend_on_the_tokens_beside_it() -> None:
    tokens = torch.randn(3, 100)
    crowd = torch.cat([tokens, 1000 * torch.randn(900, 100)])
    assert torch.equal(there_and_back(tokens), there_and_back(crowd)[:3])


def test_equal_peaks_and_opposite_peaks_keep_their_signs() -> None:
    row = torch.tensor([3.0, -3.0, 3.0, 1.0, 0.0])
    assert torch.allclose(there_and_back(row), row, atol=3 / 250)
    assert torch.equal(there_and_back(torch.full((70,), -0.5)), torch.full((70,), -0.5))
    assert torch.equal(there_and_back(torch.zeros(70)), torch.zeros(70))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_goes_in_as_well(dtype: torch.dtype) -> None:
    tensor = torch.randn(4, 64).to(dtype)
    assert torch.equal(there_and_back(tensor), there_and_back(tensor.float()))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2 * MAX_MAGNITUDE])
def test_what_no_scale_fits_is_refused_before_it_is_sent(value: float) -> None:
    tensor = torch.randn(3, 200)
    tensor[1, 130] = value
    with pytest.raises(BadMessage, match="cannot be sent"):
        quantize(tensor)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0, 1e38])
def test_scales_that_no_honest_sender_makes_are_refused(scale: float) -> None:
    packed = quantize(torch.randn(3, 200))
    packed.scales[2, 1] = scale
    with pytest.raises(BadMessage, match="scale or peak"):
        dequantize(packed)


@pytest.mark.parametrize("peak", [math.nan, math.inf, -math.inf, 2 * MAX_MAGNITUDE])
def test_peaks_that_no_honest_sender_makes_are_refused(peak: float) -> None:
    packed = quantize(torch.randn(3, 200))
    packed.peaks[0, 3] = peak
    with pytest.raises(BadMessage, match="scale or peak"):
        dequantize(packed)


def test_counts_that_do_not_fit_the_shape_are_refused() -> None:
    packed = quantize(torch.randn(3, 200))
    wrong: list[Quantized] = [
        replace(packed, shape=(3, 201)),
        replace(packed, shape=(4, 200)),
        replace(packed, scales=packed.scales[:, :3]),
        replace(packed, peaks=packed.peaks[:2]),
    ]
    for each in wrong:
        with pytest.raises(BadMessage, match="wrong number"):
            dequantize(each)
    for length in (0, 647, 649):
        with pytest.raises(BadMessage, match="cannot have"):
            from_bytes(bytearray(length), (3, 200))


@given(st.binary(min_size=140, max_size=140))
def test_any_bytes_are_finite_values_or_refused(data: bytes) -> None:
    try:
        values = dequantize(from_bytes(bytearray(data), (2, 66)))
    except BadMessage:
        return
    assert bool(torch.isfinite(values).all())
