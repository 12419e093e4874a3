"""Frames from hostile hands: every byte string is a frame, a refusal or an end, never another error."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence

import msgpack
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peers.errors import BadMessage, StreamClosed
from peers.streams.wire import (
    DTYPES,
    EIGHT_BIT,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    Frame,
    check_finite,
    read_frame,
    write_frame,
)
from peers.streams.wire_format import WireFormat


def reader_of(data: bytes) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    return reader


def read(data: bytes, *, max_payload: int = 1 << 20) -> Frame:
    async def go() -> Frame:
        return await read_frame(reader_of(data), max_payload=max_payload)

    return asyncio.run(go())


def framed(header: object, payload: bytes = b"") -> bytes:
    packed = msgpack.packb(header)
    return struct.pack(">I", len(packed)) + packed + payload


def header(specs: object = (), **changes: object) -> dict[str, object]:
    return {"q": 1, "k": "step", "b": {}, "t": list(specs) if isinstance(specs, tuple) else specs} | changes


class Sink:
    """The part of a StreamWriter that frames need."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes) -> None:
        self.data += data

    async def drain(self) -> None:
        pass


def written(frame: Frame) -> bytes:
    sink = Sink()
    asyncio.run(write_frame(sink, frame))  # type: ignore[arg-type]
    return bytes(sink.data)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3, 5)])
def test_a_tensor_arrives_as_it_was_sent(dtype: torch.dtype, shape: Sequence[int]) -> None:
    tensor = (torch.rand(shape) * 9 - 4).to(torch.float32 if dtype is torch.bool else dtype)
    tensor = tensor > 0 if dtype is torch.bool else tensor
    frame = read(
        written(
            Frame(
                request=7,
                kind="step",
                body={"a": 1},
                tensors=(tensor, tensor.mT.clone() if tensor.dim() > 1 else tensor),
            )
        )
    )
    assert (frame.request, frame.kind, dict(frame.body)) == (7, "step", {"a": 1})
    assert frame.tensors[0].dtype == dtype
    assert torch.equal(frame.tensors[0], tensor)


def test_a_view_is_sent_row_by_row() -> None:
    tensor = torch.arange(12.0).reshape(3, 4).T
    (got,) = read(written(Frame(request=1, kind="k", body={}, tensors=(tensor,)))).tensors
    assert torch.equal(got, tensor)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_the_end(data: bytes) -> None:
    with pytest.raises((BadMessage, StreamClosed)):
        read(data)


@given(st.binary(min_size=1, max_size=200))
def test_random_bytes_with_a_true_length_are_refused(data: bytes) -> None:
    with pytest.raises((BadMessage, StreamClosed)):
        read(struct.pack(">I", len(data)) + data)


_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=5),
    max_leaves=12,
)  # fmt: skip
_SPECS = st.lists(
    st.tuples(
        st.sampled_from([*DTYPES, EIGHT_BIT, "f64", "", 3, None]),
        st.lists(st.integers(-1, 2**40) | st.integers(0, 3) | st.just(0), max_size=6) | st.none(),
    ).map(list),
    max_size=4,
)


@given(st.fixed_dictionaries({"q": _PLAIN, "k": _PLAIN, "b": _PLAIN, "t": _PLAIN, "w": _PLAIN}) | _PLAIN)
def test_any_header_gives_a_frame_or_a_refusal(value: object) -> None:
    try:
        read(framed(value))
    except (BadMessage, StreamClosed):
        return


@given(_SPECS)
def test_any_tensor_list_gives_a_frame_or_a_refusal(specs: object) -> None:
    data = framed(header(specs), bytes(4096))
    try:
        frame = read(data)
    except (BadMessage, StreamClosed):
        return
    assert frame.wire_bytes <= len(data)
    eight_bit = any(spec[0] == EIGHT_BIT for spec in specs)  # type: ignore[attr-defined]
    assert frame.num_bytes <= (4 * 4096 if eight_bit else 4096)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 4), (2, 3, 65), (70, 1024)])
def test_float_tensors_arrive_in_the_format_that_was_chosen(shape: Sequence[int]) -> None:
    values, mask = torch.randn(shape), torch.ones(shape, dtype=torch.int64)
    sizes = {}
    for wire in WireFormat:
        data = written(Frame(request=7, kind="step", body={}, tensors=(values, mask, values.half()), wire=wire))
        frame = read(data, max_payload=4 << 20)
        assert (frame.wire, frame.wire_bytes) == (wire, len(data))
        assert torch.equal(frame.tensors[1], mask)
        for tensor in (frame.tensors[0], frame.tensors[2]):
            assert tensor.shape == values.shape
            assert torch.allclose(tensor.float(), values, atol=0.05)
        sizes[wire] = len(data) - mask.numel() * 8
    if values.numel() > 300:
        assert sizes[WireFormat.EIGHT_BIT] < 0.6 * sizes[WireFormat.BF16] < 0.45 * sizes[WireFormat.FP32]


def test_eight_bits_are_bounded_by_what_they_become_in_memory() -> None:
    async def go() -> None:
        reader = asyncio.StreamReader()  # no end: reading on would wait for ever
        reader.feed_data(framed(header(([EIGHT_BIT, [300]],))))
        async with asyncio.timeout(30):
            with pytest.raises(BadMessage, match="1200 bytes are refused; at most 1000"):
                await read_frame(reader, max_payload=1000)

    asyncio.run(go())


def test_an_eight_bit_tensor_that_is_cut_off_is_the_end_of_the_stream() -> None:
    whole = written(Frame(request=1, kind="k", body={}, tensors=(torch.ones(3, 70),), wire=WireFormat.EIGHT_BIT))
    for missing in (1, 12, 200):
        with pytest.raises(StreamClosed):
            read(whole[:-missing])


@given(st.integers(0, 150))
def test_a_truncated_frame_is_the_end_of_the_stream(cut: int) -> None:
    whole = written(Frame(request=1, kind="k", body={"text": "x" * 40}, tensors=(torch.ones(30),)))
    with pytest.raises(StreamClosed):
        read(whole[: min(cut, len(whole) - 1)])


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">I", 0),
        struct.pack(">I", MAX_HEADER_BYTES + 1) + bytes(MAX_HEADER_BYTES + 1),
        framed([1, 2]),
        framed(header(q=-1)),
        framed(header(q=True)),
        framed(header(k="x" * 33)),
        framed(header(b={1: 2})),
        framed(header(b=[])),
        framed(header(w="4bit")),
        framed(header(w=["8bit"])),
        framed(header(([EIGHT_BIT, [1 << 26]],))),
        framed(header(([EIGHT_BIT, [2, 64]],)), b"\xff" * 136),
        framed(header((["f64", [1]],))),
        framed(header((["f32", [-1]],))),
        framed(header((["f32", [True]],))),
        framed(header((["f32", [1.0]],))),
        framed(header((["f32", [1] * 6],))),
        framed(header((["f32", [1 << 28]],))),
        framed(header((["f32", [1 << 27] * 5],))),
        framed(header((["f32", [0, *[1 << 27] * 4]],))),
        framed(header((["u8", [(1 << 20) + 1]],))),
        framed(header(tuple(["u8", [1 << 19]] for _ in range(3)))),
        framed(header(tuple(["u8", [0]] for _ in range(MAX_TENSORS + 1)))),
        struct.pack(">I", 3000) + b"\x91" * 3000,
        struct.pack(">I", 5) + b"\xdf\xff\xff\xff\xff",
    ],
    ids=str,
)  # fmt: skip
def test_what_breaks_the_rules_is_refused(data: bytes) -> None:
    with pytest.raises(BadMessage):
        read(data + bytes(64))


def test_a_claimed_payload_is_refused_before_it_is_read() -> None:
    async def go() -> None:
        reader = asyncio.StreamReader()  # no end: reading on would wait for ever
        reader.feed_data(framed(header((["u8", [1 << 26]],))))
        async with asyncio.timeout(30):
            with pytest.raises(BadMessage, match="at most 1000"):
                await read_frame(reader, max_payload=1000)

    asyncio.run(go())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_refused(value: float, dtype: torch.dtype) -> None:
    check_finite((torch.zeros(3, dtype=dtype), torch.ones(2, dtype=torch.int64)))
    with pytest.raises(BadMessage, match="not finite"):
        check_finite((torch.zeros(3, dtype=dtype), torch.tensor([0.0, value], dtype=dtype)))


@pytest.mark.parametrize(
    "frame",
    [
        Frame(request=1, kind="k", body={"text": "x" * MAX_HEADER_BYTES}),
        Frame(request=1, kind="k", body={}, tensors=(torch.empty((1 << 27) + 1, dtype=torch.uint8),)),
        Frame(request=1, kind="k", body={}, tensors=(torch.zeros(2, dtype=torch.float64),)),
    ],
    ids=["header", "payload", "dtype"],
)
def test_what_nobody_would_read_is_not_sent(frame: Frame) -> None:
    sink = Sink()
    with pytest.raises(BadMessage):
        asyncio.run(write_frame(sink, frame))  # type: ignore[arg-type]
    assert not sink.data
