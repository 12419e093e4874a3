"""Codecs: how far decoded values are off, and what bytes from strangers can do."""

from __future__ import annotations

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from averaging.codecs import CODECS, make_codec
from averaging.errors import BadTensors

ALL = [make_codec(name, lossless=lossless) for name in CODECS for lossless in (False, True)]
ALL += [make_codec("topk", top_share=0.3), make_codec("topk", top_share=1.0)]
BLOCKWISE = {"int8": (256, 127), "int4": (64, 7)}
LARGEST_FLOAT = float(torch.finfo(torch.float32).max)
BOMB = zlib.compress(bytes(20_000_000), level=9)
SIZES = [0, 1, 2, 7, 63, 64, 65, 255, 256, 257, 3001]
each_codec = pytest.mark.parametrize("codec", ALL, ids=lambda codec: codec.name)
each_plain = pytest.mark.parametrize("codec", ALL[::2][: len(CODECS)], ids=lambda codec: codec.name)


def gaussian(num_values: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_values, generator=torch.Generator().manual_seed(seed))


def round_trip(codec, vector):
    return codec.decode(codec.encode(vector), vector.numel())


def step_per_value(vector, block_values: int, most_code: int):
    """The distance of neighbouring codes at each value, were scales exact."""
    blocks = torch.nn.functional.pad(vector, (0, -vector.numel() % block_values)).view(-1, block_values)
    steps = blocks.abs().amax(dim=1, keepdim=True).double() / most_code
    return steps.expand(blocks.shape).reshape(-1)[: vector.numel()]


finite_vectors = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=150).map(
    lambda values: torch.tensor(values, dtype=torch.float32)
)


# -- There and back


@each_codec
def test_a_decoded_vector_is_flat_fp32_of_the_same_length_and_owns_its_memory(codec):
    for num_values in SIZES:
        data = codec.encode(gaussian(num_values))
        assert len(data) <= codec.most_bytes(num_values)
        decoded = codec.decode(data, num_values)
        assert decoded.dtype == torch.float32
        assert decoded.shape == (num_values,)
        decoded += 1  # neither the bytes nor the codec share it
        assert torch.equal(codec.decode(data, num_values) + 1, decoded)


@pytest.mark.parametrize("offset", [0, 1, 4])
@each_codec
def test_a_vector_is_read_from_the_middle_of_a_message(codec, offset):
    vector = gaussian(333)
    message = bytearray(offset) + codec.encode(vector)
    decoded = codec.decode(memoryview(message)[offset:], 333)
    assert torch.equal(decoded, round_trip(codec, vector))
    assert decoded.data_ptr() % 4 == 0


@pytest.mark.parametrize("lossless", [False, True])
@given(vector=finite_vectors)
def test_fp32_gives_back_every_bit(lossless, vector):
    codec = make_codec("fp32", lossless=lossless)
    assert torch.equal(round_trip(codec, vector).view(torch.int32), vector.view(torch.int32))
    assert not codec.is_lossy


def test_fp16_rounds_to_the_nearest_half_and_saturates():
    vector = torch.tensor([1.0, 1 / 3, 65519.0, 65520.0, 1e30, -LARGEST_FLOAT, 1e-30, -0.0])
    halves = [1.0, 0.333251953125, 65504.0, 65504.0, 65504.0, -65504.0, 0.0, 0.0]
    assert round_trip(make_codec("fp16"), vector).tolist() == halves


@pytest.mark.parametrize("name", BLOCKWISE)
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_blockwise_codes_are_off_by_half_a_step_of_their_own_block(name, size):
    for num_values in SIZES:
        vector = gaussian(num_values) * size
        vector[num_values // 2 :] *= 1000  # blocks must not share a scale
        error = (round_trip(make_codec(name), vector).double() - vector.double()).abs()
        assert (error <= 0.501 * step_per_value(vector, *BLOCKWISE[name])).all()


@pytest.mark.parametrize("name", BLOCKWISE)
def test_the_largest_floats_stay_finite_and_the_smallest_become_zero(name):
    codec = make_codec(name)
    extreme = torch.tensor([LARGEST_FLOAT, -LARGEST_FLOAT, 0.0])
    torch.testing.assert_close(round_trip(codec, extreme), extreme, rtol=2**-7, atol=0)
    tiny = torch.tensor([1e-45, -1e-45, 1e-40, 2e-38])
    assert round_trip(codec, tiny).abs().sum() == 0


def test_the_largest_share_survives_and_all_else_is_zero():
    codec = make_codec("topk", top_share=0.1)
    for size in (1e-30, 1.0, 1e30):
        vector = gaussian(1001) * size
        decoded = round_trip(codec, vector)
        kept = vector.abs().argsort(descending=True, stable=True)[:101]
        assert set(decoded.nonzero().flatten().tolist()) == set(kept.tolist())
        torch.testing.assert_close(decoded[kept], vector[kept], rtol=2**-11, atol=0)


@pytest.mark.parametrize("value", [LARGEST_FLOAT, -LARGEST_FLOAT, 1e-38, 1e-45, -1e-45])
def test_topk_holds_the_extremes_of_fp32(value):
    decoded = round_trip(make_codec("topk"), torch.tensor([0.0, value, 0.0]))
    torch.testing.assert_close(decoded, torch.tensor([0.0, value, 0.0]), rtol=2**-11, atol=0)


def test_of_equal_magnitudes_topk_keeps_the_first():
    vector = torch.tensor([1.0, -2.0, 2.0, -1.0, 1.0, 0.5, -1.0, 0.0, 0.0, 0.0])
    for share, kept in ((0.1, [1]), (0.11, [1, 2]), (0.4, [0, 1, 2, 3])):
        decoded = round_trip(make_codec("topk", top_share=share), vector)
        expected = torch.zeros(10)
        expected[kept] = vector[kept]
        assert torch.equal(decoded, expected)


@pytest.mark.parametrize("places", [[5999], [0], [0, 255, 511, 766, 5999], [254, 5998, 5999]])
def test_topk_finds_places_that_are_far_apart(places):
    vector = torch.zeros(6000)
    vector[places] = torch.arange(1.0, len(places) + 1)
    codec = make_codec("topk", top_share=len(places) / 6000)
    assert torch.equal(round_trip(codec, vector), vector)
    assert codec.encode(vector)[0] == 1  # as gaps


def test_topk_writes_places_the_shorter_way():
    vector = gaussian(8000)
    few, many = (make_codec("topk", top_share=share).encode(vector) for share in (0.01, 0.3))
    assert (few[0], many[0]) == (1, 0)
    assert len(few) < 5 + 2 * 80 + 1000 == len(many) - 2 * (2400 - 80)


@each_codec
@settings(max_examples=40)
@given(vector=finite_vectors)
def test_decoding_and_encoding_again_changes_nothing(codec, vector):
    once = round_trip(codec, vector)
    assert torch.isfinite(once).all()
    assert torch.equal(round_trip(codec, once), once)


@each_codec
def test_equal_vectors_give_equal_bytes_however_they_lie_in_memory(codec):
    vector = gaussian(5000)
    spread = torch.stack([vector, torch.zeros(5000)], dim=1)[:, 0]
    data = codec.encode(vector)
    assert codec.encode(vector.clone()) == data
    assert codec.encode(spread) == data


def test_bytes_are_little_endian_wherever_they_are_written():
    one = torch.tensor([1.0, -0.5, 0.25])
    assert make_codec("fp32").encode(one) == struct.pack("<3f", *one.tolist())
    assert make_codec("fp16").encode(one) == struct.pack("<3e", *one.tolist())
    vector = torch.tensor([127.0, -64.0, 1.0])
    assert make_codec("int8").encode(vector) == struct.pack("<f3b", 1.0, 127, -64, 1)
    assert make_codec("int4").encode(torch.tensor([7.0, -1.0, 3.0])) == bytes([0x80, 0x3F, 0xF7, 0x03])
    assert make_codec("topk").encode(vector) == struct.pack("<BfeB", 0, 2.0**-8, 127.0 * 256, 0b001)


# -- What it costs


@pytest.mark.parametrize(("name", "most"), [("fp16", 0.5), ("int8", 0.26), ("int4", 0.14), ("topk", 0.04)])
def test_a_long_vector_takes_at_most_its_share_of_the_bytes(name, most):
    assert len(make_codec(name).encode(gaussian(100_000))) <= most * 4 * 100_000


@each_plain
def test_zlib_pays_on_zeros_and_costs_one_byte_on_noise(codec):
    zipped = make_codec(codec.name, lossless=True)
    zeros = torch.zeros(20_000)
    assert len(zipped.encode(zeros)) < 0.05 * len(codec.encode(zeros))
    noise = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, 40).astype(np.float32))
    assert len(zipped.encode(noise)) <= len(codec.encode(noise)) + 1
    assert torch.equal(round_trip(zipped, noise), round_trip(codec, noise))


def test_zlib_over_planes_saves_a_tenth_of_exact_floats():
    assert len(make_codec("fp32", lossless=True).encode(gaussian(50_000))) < 0.9 * 4 * 50_000


# -- Bytes from strangers


def check_refused_or_whole(codec, data: bytes, num_values: int) -> None:
    try:
        decoded = codec.decode(data, num_values)
    except BadTensors:
        return
    assert decoded.shape == (num_values,)
    assert decoded.dtype == torch.float32
    assert torch.isfinite(decoded).all()


@each_codec
@settings(max_examples=50)
@given(data=st.binary(max_size=200), num_values=st.integers(0, 70))
def test_any_bytes_are_refused_or_give_finite_values(codec, data, num_values):
    check_refused_or_whole(codec, data, num_values)


@each_codec
@settings(max_examples=50)
@given(draw=st.data(), num_values=st.integers(0, 300))
def test_damaged_bytes_are_refused_or_give_finite_values(codec, draw, num_values):
    data = bytearray(codec.encode(gaussian(num_values)))
    for _ in range(draw.draw(st.integers(1, 4)) if data else 0):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.sampled_from([0, 1, 2, 0x7F, 0x80, 0xFF]))
    check_refused_or_whole(codec, bytes(data), num_values)


@each_plain
@settings(max_examples=50)
@given(draw=st.data(), num_values=st.integers(0, 70))
def test_bytes_of_the_right_length_and_marker_are_refused_or_give_finite_values(codec, draw, num_values):
    size = codec.most_bytes(num_values)
    data = bytearray(draw.draw(st.binary(min_size=size, max_size=size)))
    if codec.name == "topk":
        data[0] = draw.draw(st.integers(0, 1))
    check_refused_or_whole(codec, bytes(data), num_values)


@each_codec
def test_bytes_cut_short_or_made_longer_are_refused(codec):
    for num_values in SIZES:
        data = codec.encode(gaussian(num_values))
        for wrong in {data[:-1], data + b"\0", data + data, b""} - {data}:
            with pytest.raises(BadTensors, match=r"bytes|gaps|bits"):
                codec.decode(wrong, num_values)


@each_plain
def test_a_vector_of_another_length_is_refused(codec):
    with pytest.raises(BadTensors, match=r"of 1300 values|are not 1300 values"):
        codec.decode(codec.encode(gaussian(1000)), 1300)


@pytest.mark.parametrize(("name", "form"), [("fp32", "<2f"), ("fp16", "<2e")])
@pytest.mark.parametrize("damage", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(name, form, damage):
    with pytest.raises(BadTensors, match="not finite"):
        make_codec(name).decode(struct.pack(form, 1.0, damage), 2)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), float("-inf"), -1.0, LARGEST_FLOAT])
def test_scales_that_cannot_be_are_refused(scale):
    bits = struct.pack("<f", scale)
    for name, data in [
        ("int8", bits + bytes([127])),
        ("int4", bits[2:] + bytes([7])),
        ("topk", b"\0" + bits + struct.pack("<e", 2.0) + b"\1"),
    ]:
        with pytest.raises(BadTensors, match="a scale of"):
            make_codec(name).decode(data, 1)


def test_codes_and_bits_that_encode_never_writes_are_refused():
    for name, data, message in [
        ("int8", struct.pack("<fb", 1.0, -128), "out of range"),
        ("int4", bytes([0x80, 0x3F, 0x08]), "out of range"),
        ("int4", bytes([0x80, 0x3F, 0x11]), "beyond the last"),
        ("topk", struct.pack("<BfeB", 0, 1.0, 1.0, 0b10), "do not mark 1 of 1"),
        ("topk", struct.pack("<BfeB", 0, 1.0, 1.0, 0b00), "do not mark 1 of 1"),
        ("topk", struct.pack("<BfeB", 0, 1.0, 1.0, 0b11), "do not mark 1 of 1"),
        ("topk", struct.pack("<BfeB", 0, 1.0, float("nan"), 0b1), "hold values that are not finite"),
        ("topk", struct.pack("<BfeB", 2, 1.0, 1.0, 0b1), "marker 2"),
    ]:
        with pytest.raises(BadTensors, match=message):
            make_codec(name).decode(data, 1)


def test_gaps_that_lead_nowhere_are_refused():
    codec = make_codec("topk", top_share=1 / 512)  # 2 of 1024
    head = struct.pack("<Bfee", 1, 1.0, 1.0, 2.0)
    assert codec.decode(head + bytes([3, 255, 0]), 1024).nonzero().flatten().tolist() == [3, 259]
    assert codec.decode(head + bytes([255, 255, 255, 255, 2, 0]), 1024).nonzero().flatten().tolist() == [1022, 1023]
    past_the_end = [255, 255, 255, 255, 3, 0]
    for gaps in (past_the_end, [255] * 5 + [254, 254], [3], [3, 255], [3, 4, 255], [3, 4, 5], [0] * 130):
        with pytest.raises(BadTensors, match=r"do not lead to 2 of 1024|bytes are not 1024"):
            codec.decode(head + bytes(gaps), 1024)


def test_deflated_bytes_must_inflate_to_what_was_asked_for():
    codec = make_codec("fp32", lossless=True)
    good = codec.encode(torch.zeros(1000))
    assert good[0] == 1
    stream = good[1:]
    for data, message in [
        (b"\1" + zlib.compress(bytes(4004)), "wrong length"),
        (b"\1" + zlib.compress(bytes(3996)), "3996 bytes are not 1000"),
        (b"\1" + zlib.compress(bytes(3999)), "wrong length"),
        (b"\1" + stream[:-1], "wrong length"),
        (b"\1" + stream + b"\0", "wrong length"),
        (b"\1" + stream[:-1] + bytes([stream[-1] ^ 1]), "do not inflate"),
        (b"\1", "wrong length"),
        (b"\2" + stream, "marker 2"),
        (b"\0" + stream, "are not 1000 values"),
        (b"", "0 bytes"),
    ]:
        with pytest.raises(BadTensors, match=message):
            codec.decode(data, 1000)


@each_codec
def test_no_bytes_take_more_memory_than_two_vectors(codec):
    num_values = 20_000
    bomb = (b"\1" + BOMB)[: codec.most_bytes(num_values)]
    long_gaps = b"\1" + struct.pack("<f", 1.0) + b"\xff" * (codec.most_bytes(num_values) - 5)
    honest = codec.encode(gaussian(num_values))
    for data in (bomb, long_gaps, honest, bytes(codec.most_bytes(num_values)), bytes(10_000_000)):
        # Threads that earlier tests left behind are traced, too; what a codec takes, it takes each time.
        assert min(peak_bytes_of(codec, data, num_values) for _ in range(3)) <= 9 * num_values + 100_000


def peak_bytes_of(codec, data, num_values):
    tracemalloc.start()
    try:
        check_refused_or_whole(codec, data, num_values)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_bomb_for_an_empty_vector_is_refused():
    for name in CODECS:
        with pytest.raises(BadTensors, match="bytes are not 0 values"):
            make_codec(name, lossless=True).decode(b"\1" + BOMB, 0)


# -- This peer's own mistakes


@each_codec
@pytest.mark.parametrize(
    "vector",
    [torch.tensor([1.0, torch.nan]), torch.tensor([-torch.inf]), torch.zeros(2, 2), torch.zeros(2).double()],
)
def test_a_vector_that_cannot_be_encoded_is_refused(codec, vector):
    with pytest.raises(BadTensors, match=r"not finite|flat float32"):
        codec.encode(vector)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="'int2'; use one of fp32, fp16, int8, int4, topk"):
        make_codec("int2")
    for share in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="top_share"):
            make_codec("topk", top_share=share)


def test_names_tell_wire_formats_apart():
    names = [make_codec(name, lossless=lossless).name for lossless in (False, True) for name in CODECS]
    assert len(set(names)) == 2 * len(CODECS)
    assert names[: len(CODECS)] == list(CODECS)
    assert [make_codec(name, lossless=True).is_lossy for name in CODECS] == [False, True, True, True, True]
