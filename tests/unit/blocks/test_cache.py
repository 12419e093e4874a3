"""Decoding sessions: the byte budget, positions, and what a refused or failed step leaves behind."""

from __future__ import annotations

import pytest
import torch

from blocks.adapters import LoraSettings, add_version, attach, read_units
from blocks.decoding.cache import SessionCaches
from blocks.errors import BadAdapter, BadSession, BadSpan, CacheFull
from blocks.load import SpanModel
from blocks.spans import Span
from tests.errors_page import met

HIDDEN_BTD = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(2))
BYTES_PER_TOKEN = 2 * 2 * 16 * 4  # keys and values, two heads of 16, fp32


def step(caches: SessionCaches, hidden_BTD: torch.Tensor, position: int, **options: object) -> torch.Tensor:
    given = {"mask_BT": None, "position_ids_BT": None} | options
    return caches.step("s", hidden_BTD, position=position, **given)  # type: ignore[arg-type]


@pytest.fixture
def caches(llama_span: SpanModel) -> SessionCaches:
    caches = SessionCaches(llama_span, 100_000)
    caches.open("s", span=Span(2, 5), batch=2, max_length=16, version="live")
    return caches


def test_bytes_are_reserved_at_opening_and_free_after_closing(llama_span: SpanModel) -> None:
    caches = SessionCaches(llama_span, 64 * 3 * BYTES_PER_TOKEN)  # rows have 16, 32, 64 ... positions
    assert caches.bytes_per_token(Span(2, 5)) == 3 * BYTES_PER_TOKEN
    caches.open("a", span=Span(2, 5), batch=2, max_length=15, version="live")
    assert caches.free_bytes == 32 * 3 * BYTES_PER_TOKEN
    with pytest.raises(CacheFull) as caught:
        caches.open("b", span=Span(2, 5), batch=1, max_length=33, version="live")
    met("a session of … bytes does not fit", caught.value)
    caches.open("b", span=Span(2, 3), batch=3, max_length=30, version="live")
    assert caches.free_bytes == 0
    caches.close("a")
    caches.close("a")
    assert caches.free_bytes == 32 * 3 * BYTES_PER_TOKEN
    assert caches.sessions == ("b",)


def test_stepping_gives_what_one_pass_gives(caches: SessionCaches, llama_span: SpanModel) -> None:
    want = llama_span.forward(HIDDEN_BTD, span=Span(2, 5))
    got = torch.cat(
        [step(caches, HIDDEN_BTD[:, :5], 0), *(step(caches, HIDDEN_BTD[:, i : i + 1], i) for i in (5, 6, 7))], 1
    )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert caches.state("s").length == 8


def test_an_earlier_position_rolls_back(caches: SessionCaches, llama_span: SpanModel) -> None:
    step(caches, HIDDEN_BTD, 0)
    step(caches, HIDDEN_BTD[:, :2], 3)
    assert caches.state("s").length == 5
    got = step(caches, HIDDEN_BTD[:, 3:], 3)
    want = llama_span.forward(HIDDEN_BTD, span=Span(2, 5))[:, 3:]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    again = step(caches, HIDDEN_BTD, 0)
    torch.testing.assert_close(again[:, 3:], want, rtol=0, atol=1e-5)


def test_rows_go_on_from_the_rows_they_name(caches: SessionCaches, llama_span: SpanModel) -> None:
    step(caches, HIDDEN_BTD[:, :7], 0)
    got = step(caches, HIDDEN_BTD[:, 7:], 7, rows=(1, 1))
    mixed = torch.cat([HIDDEN_BTD[[1, 1], :7], HIDDEN_BTD[:, 7:]], 1)
    torch.testing.assert_close(got, llama_span.forward(mixed, span=Span(2, 5))[:, 7:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "position", "options"),
    [
        ((2, 1, 64), 4, {}),
        ((2, 1, 64), -1, {}),
        ((2, 14, 64), 3, {}),
        ((2, 0, 64), 3, {}),
        ((1, 1, 64), 3, {}),
        ((2, 1, 63), 3, {}),
        ((2, 64), 3, {}),
        ((2, 1, 64), 3, {"rows": (0,)}),
        ((2, 1, 64), 3, {"rows": (0, 2)}),
        ((2, 1, 64), 3, {"rows": (0, -1)}),
        ((2, 1, 64), 3, {"mask_BT": torch.ones(2, 3)}),
        ((2, 1, 64), 3, {"position_ids_BT": torch.ones(2, 2)}),
    ],
)
def test_a_step_that_does_not_fit_is_refused_and_changes_nothing(
    caches: SessionCaches, shape: tuple[int, ...], position: int, options: dict[str, object]
) -> None:
    step(caches, HIDDEN_BTD[:, :3], 0)
    with pytest.raises(BadSession):
        step(caches, torch.zeros(shape), position, **options)
    assert caches.state("s").length == 3
    step(caches, HIDDEN_BTD[:, 3:4], 3)


def test_a_step_that_fails_in_the_middle_closes_its_session(caches: SessionCaches, llama_span: SpanModel) -> None:
    step(caches, HIDDEN_BTD[:, :3], 0)

    def fail(module: object, args: object) -> None:
        raise RuntimeError("the machine is out of memory")

    hook = llama_span.cut.held[4].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="memory"):
        step(caches, HIDDEN_BTD[:, 3:4], 3)
    hook.remove()
    assert caches.sessions == ()
    assert caches.free_bytes == 100_000
    with pytest.raises(BadSession, match="not open"):
        step(caches, HIDDEN_BTD[:, 3:4], 3)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"session": "s"}, BadSession),
        ({"session": ""}, BadSession),
        ({"session": "x" * 200}, BadSession),
        ({"batch": 0}, BadSession),
        ({"batch": 10**9}, BadSession),
        ({"max_length": 0}, BadSession),
        ({"max_length": 129}, BadSession),
        ({"span": Span(1, 3)}, BadSpan),
        ({"max_length": 128, "batch": 2}, CacheFull),
    ],
)
def test_a_session_that_cannot_be_is_refused(
    caches: SessionCaches, options: dict[str, object], error: type[Exception]
) -> None:
    given: dict[str, object] = {"session": "t", "span": Span(2, 5), "batch": 1, "max_length": 4, "version": "live"}
    given |= options
    with pytest.raises(error):
        caches.open(given.pop("session"), **given)  # type: ignore[arg-type]
    assert caches.sessions == ("s",)


def test_a_session_decodes_with_the_version_it_was_opened_with(llama_span: SpanModel) -> None:
    attach(llama_span, LoraSettings(rank=4, seed=1))
    caches = SessionCaches(llama_span, 100_000)
    moved = {u: {n: t + 0.05 for n, t in named.items()} for u, named in read_units(llama_span).items()}
    add_version(llama_span, "round-1", moved)
    outputs = []
    for name, version in (("a", "live"), ("b", "round-1")):
        caches.open(name, span=Span(2, 5), batch=2, max_length=8, version=version)
        outputs.append(caches.step(name, HIDDEN_BTD[:, :3], position=0, mask_BT=None, position_ids_BT=None, rows=None))
    assert not torch.equal(outputs[0], outputs[1])
    with pytest.raises(BadAdapter, match="never"):
        caches.open("c", span=Span(2, 5), batch=1, max_length=8, version="never")
