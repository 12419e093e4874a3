"""Sessions computed together against each alone with the family's own cache: twenty families, in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from blocks.adapters import LoraSettings, add_version, attach, read_units, use_version
from blocks.decoding.cache import SessionCaches
from blocks.decoding.passes import why_not_together
from blocks.decoding.sessions import StepRequest
from blocks.decoding.solo_cache import solo_cache
from blocks.errors import BadSession, CacheFull
from blocks.load import SpanModel, load_span
from blocks.source import ModelSource, find_model
from blocks.spans import Span
from tests.families import FAMILIES
from tests.unit.blocks.conftest import CPU, save_tiny

# peft asks transformers a question under its old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

SPAN = Span(1, 5)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SpanModel:
    directory = tmp_path_factory.mktemp(request.param)
    save_tiny(request.param, directory)
    source = find_model(str(directory), cache_dir=directory / "cache")
    return load_span(source, SPAN, dtype=torch.float32, device=CPU)


@pytest.fixture
def llama(llama_source: ModelSource) -> SpanModel:
    return load_span(llama_source, SPAN, dtype=torch.float32, device=CPU)


def inputs(seed: int, tokens: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, tokens, 64, generator=torch.Generator().manual_seed(seed))


def alone(model: SpanModel, hidden_BTD: Tensor, mask_BT: Tensor | None = None, version: str = "live") -> Tensor:
    """In one pass, without a cache of ours."""
    if model.settings is not None:
        use_version(model, version)
    with torch.no_grad():
        return model.forward(hidden_BTD, span=SPAN, mask_BT=mask_BT, cache=solo_cache(model, SPAN))


def together(caches: SessionCaches, *requests: StepRequest) -> list[Tensor]:
    results = caches.step_many(requests)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results  # type: ignore[return-value]


def test_sessions_together_equal_each_alone_whatever_they_do(model: SpanModel) -> None:
    """Unequal prompts, one longer than the sliding windows; joining, padding, rolling back, reordering, leaving."""
    caches = SessionCaches(model, 1 << 24)
    assert caches.alone_because is None
    texts = {"a": inputs(1, 24), "b": inputs(2, 24), "c": inputs(3, 24, batch=2), "d": inputs(4, 24)}
    mask_BT = torch.ones(2, 24, dtype=torch.long)
    mask_BT[0, :3] = 0  # c is a batch with padding on the left
    masks = {"c": mask_BT}
    want = {name: alone(model, text, masks.get(name)) for name, text in texts.items()}

    def advance(**slices: tuple[int, int]) -> None:
        requests = [
            StepRequest(
                session=name,
                hidden_BTD=texts[name][:, start:end],
                position=start,
                mask_BT=masks[name][:, :end] if name in masks else None,
            )
            for name, (start, end) in slices.items()
        ]
        for (name, (start, end)), got in zip(slices.items(), together(caches, *requests), strict=True):
            seen = masks[name][:, start:end] == 1 if name in masks else torch.ones(1, end - start) == 1
            torch.testing.assert_close(got[seen], want[name][:, start:end][seen], rtol=1e-6, atol=3e-5)

    for name, text in texts.items():
        if name != "d":
            caches.open(name, span=SPAN, batch=text.shape[0], max_length=40, version="live")
    advance(a=(0, 12), b=(0, 3), c=(0, 7))
    advance(a=(12, 13), b=(3, 4), c=(7, 8))
    advance(c=(8, 9), a=(13, 14))
    caches.open("d", span=SPAN, batch=1, max_length=40, version="live")
    advance(d=(0, 9), b=(4, 10))
    advance(a=(14, 15), b=(10, 11), c=(9, 10), d=(9, 10))
    advance(a=(2, 6), d=(10, 11), b=(5, 6))  # deeper than the window
    advance(a=(6, 7), b=(6, 7), c=(10, 11), d=(11, 12))
    caches.close("b")
    advance(a=(7, 8), c=(11, 12), d=(12, 13))
    caches.open("b", span=SPAN, batch=1, max_length=40, version="live")
    advance(b=(0, 20), a=(8, 20), d=(13, 20))
    advance(d=(20, 24), b=(20, 21), a=(20, 23), c=(12, 13))
    assert caches.state("d").length == 24


def test_rows_go_on_from_others_while_sessions_are_together(model: SpanModel) -> None:
    caches = SessionCaches(model, 1 << 24)
    text_BTD, other_BTD = inputs(1, 12, batch=3), inputs(2, 9)
    caches.open("beams", span=SPAN, batch=3, max_length=20, version="live")
    caches.open("other", span=SPAN, batch=1, max_length=20, version="live")
    together(
        caches,
        StepRequest(session="beams", hidden_BTD=text_BTD[:, :11], position=0),
        StepRequest(session="other", hidden_BTD=other_BTD[:, :8], position=0),
    )
    beams, other = together(
        caches,
        StepRequest(session="beams", hidden_BTD=text_BTD[:, 11:], position=11, rows=(2, 0, 0)),
        StepRequest(session="other", hidden_BTD=other_BTD[:, 8:], position=8),
    )
    mixed = torch.cat([text_BTD[[2, 0, 0], :11], text_BTD[:, 11:]], 1)
    torch.testing.assert_close(beams, alone(model, mixed)[:, 11:], rtol=1e-6, atol=3e-5)
    torch.testing.assert_close(other, alone(model, other_BTD)[:, 8:], rtol=1e-6, atol=3e-5)


def test_rows_of_one_pass_use_their_own_versions_of_the_adapter(model: SpanModel) -> None:
    if model.settings is None:
        attach(model, LoraSettings(rank=4, seed=1))
        for label, by in (("r1", 0.05), ("r2", -0.05)):
            add_version(model, label, {u: {n: t + by for n, t in k.items()} for u, k in read_units(model).items()})
    caches = SessionCaches(model, 1 << 24)
    texts = {"r1": inputs(1, 8), "live": inputs(2, 8, batch=2), "r2": inputs(3, 8)}
    for version, text in texts.items():
        caches.open(version, span=SPAN, batch=text.shape[0], max_length=20, version=version)
    for at, (start, end) in enumerate(((0, 6), (6, 7), (7, 8))):
        shift = {name: number for number, name in enumerate(texts) if at == 0}
        requests = [
            StepRequest(session=name, hidden_BTD=text[:, start : end - shift.get(name, 0)], position=start)
            for name, text in texts.items()
        ]
        for name, got in zip(texts, together(caches, *requests), strict=True):
            want = alone(model, texts[name], version=name)[:, start : end - shift.get(name, 0)]
            torch.testing.assert_close(got, want, rtol=1e-6, atol=3e-5)
        for request in requests:  # those that were shorter catch up
            if shift.get(request.session):
                rest = texts[request.session][:, end - shift[request.session] : end]
                together(
                    caches, StepRequest(session=request.session, hidden_BTD=rest, position=end - shift[request.session])
                )


def open_three(model: SpanModel, budget: int = 1 << 24) -> SessionCaches:
    caches = SessionCaches(model, budget)
    for name in "abc":
        caches.open(name, span=SPAN, batch=1, max_length=64, version="live")
    return caches


def test_bad_requests_are_refused_and_the_others_go_on(llama: SpanModel) -> None:
    caches = open_three(llama)
    good = inputs(1, 4)
    nan = torch.full((1, 4, 64), float("nan"))
    results = caches.step_many(
        [
            StepRequest(session="a", hidden_BTD=good, position=3),
            StepRequest(session="b", hidden_BTD=good, position=0),
            StepRequest(session="nobody", hidden_BTD=good, position=0),
            StepRequest(session="c", hidden_BTD=nan, position=0),
        ]
    )
    assert [type(result) for result in results] == [BadSession, Tensor, BadSession, BadSession]
    torch.testing.assert_close(results[1], alone(llama, good), rtol=1e-6, atol=1e-5)
    assert [caches.state(name).length for name in "abc"] == [0, 4, 0]


def test_requests_of_one_session_follow_each_other(llama: SpanModel) -> None:
    caches = open_three(llama)
    text = inputs(1, 6)
    parts = [StepRequest(session="a", hidden_BTD=text[:, at : at + 2], position=at) for at in (0, 2, 4)]
    got = together(caches, *parts, StepRequest(session="b", hidden_BTD=text, position=0))
    torch.testing.assert_close(torch.cat(got[:3], 1), alone(llama, text), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(got[3], alone(llama, text), rtol=1e-6, atol=1e-5)


def test_only_the_session_to_blame_is_closed_when_a_pass_fails(llama: SpanModel) -> None:
    caches = open_three(llama)
    text = inputs(1, 5)
    together(caches, *(StepRequest(session=name, hidden_BTD=text[:, :4], position=0) for name in "abc"))

    def fail(module: object, args: tuple[Tensor, ...]) -> None:
        if bool((args[0] > 1e4).any()):
            raise RuntimeError("this input breaks the machine")

    hook = llama.cut.held[1].self_attn.q_proj.register_forward_pre_hook(fail)
    norm = llama.cut.held[1].input_layernorm
    norm.forward = lambda hidden: hidden  # so that the large value arrives
    want = alone(llama, text)
    results = caches.step_many(
        [StepRequest(session=n, hidden_BTD=text[:, 4:] * (1e6 if n == "b" else 1), position=4) for n in "abc"]
    )
    hook.remove()
    del norm.forward
    assert isinstance(results[1], RuntimeError)
    assert caches.sessions == ("a", "c")
    assert isinstance(results[0], Tensor)
    assert torch.equal(results[0], results[2])
    assert want.shape == (1, 5, 64)


def test_values_that_overflow_end_their_session_and_reach_no_other(llama: SpanModel) -> None:
    caches = open_three(llama)
    text = inputs(1, 8)
    huge = torch.full((1, 8, 64), 3e38)
    norm = llama.cut.held[1].input_layernorm
    norm.forward = lambda hidden: hidden
    results = caches.step_many(
        [StepRequest(session=name, hidden_BTD=huge if name == "a" else text, position=0) for name in "ab"]
    )
    del norm.forward
    assert isinstance(results[0], BadSession)
    assert isinstance(results[1], Tensor)
    assert caches.sessions == ("b", "c")
    caches.open("a", span=SPAN, batch=1, max_length=64, version="live")
    got = together(
        caches,
        StepRequest(session="a", hidden_BTD=text[:, :2], position=0),
        StepRequest(session="c", hidden_BTD=text, position=0),
    )
    torch.testing.assert_close(got[0], alone(llama, text)[:, :2], rtol=1e-6, atol=1e-5)


def test_sessions_grow_past_what_they_expected_while_there_is_room(llama: SpanModel) -> None:
    per_token = SessionCaches(llama, 0).bytes_per_token(SPAN)
    caches = SessionCaches(llama, per_token * 96)
    for name in "ab":
        caches.open(name, span=SPAN, batch=1, max_length=128, version="live", expected_length=10)
    text = inputs(1, 80)
    want = alone(llama, text)
    together(caches, *(StepRequest(session=name, hidden_BTD=text[:, :10], position=0) for name in "ab"))
    assert caches.allocated_bytes == per_token * 32
    got = together(caches, StepRequest(session="a", hidden_BTD=text[:, 10:60], position=10))
    torch.testing.assert_close(got[0], want[:, 10:60], rtol=1e-6, atol=1e-5)
    assert caches.free_bytes == per_token * 16
    (full,) = caches.step_many([StepRequest(session="b", hidden_BTD=text[:, 10:60], position=10)])
    assert isinstance(full, CacheFull)
    assert caches.state("b").length == 10
    assert caches.allocated_bytes <= per_token * 96
    caches.close("a")
    got = together(caches, StepRequest(session="b", hidden_BTD=text[:, 10:60], position=10))
    torch.testing.assert_close(got[0], want[:, 10:60], rtol=1e-6, atol=1e-5)


def test_sessions_of_unlike_length_share_a_pass_also_when_memory_is_short(llama: SpanModel) -> None:
    per_token = SessionCaches(llama, 0).bytes_per_token(SPAN)
    for budget, company in ((per_token * (16 + 128), False), (per_token * 2048, True)):
        caches = SessionCaches(llama, budget)
        caches.open("short", span=SPAN, batch=1, max_length=16, version="live")
        caches.open("long", span=SPAN, batch=1, max_length=128, version="live")
        text = inputs(1, 100)
        want = alone(llama, text)
        together(caches, StepRequest(session="long", hidden_BTD=text[:, :90], position=0))
        together(caches, StepRequest(session="short", hidden_BTD=text[:, :4], position=0))
        short, long = together(
            caches,
            StepRequest(session="short", hidden_BTD=text[:, 4:5], position=4),
            StepRequest(session="long", hidden_BTD=text[:, 90:91], position=90),
        )
        torch.testing.assert_close(short, want[:, 4:5], rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(long, want[:, 90:91], rtol=1e-6, atol=1e-5)
        assert (caches.state("short").num_bytes == per_token * 128) is company


def test_what_sessions_hold_stays_under_the_budget_while_they_come_and_go(llama: SpanModel) -> None:
    per_token = SessionCaches(llama, 0).bytes_per_token(SPAN)
    caches = SessionCaches(llama, per_token * 256)
    generator = torch.Generator().manual_seed(5)
    text = inputs(1, 64)
    want = alone(llama, text)
    opened: dict[str, int] = {}
    for number in range(60):
        length = int(torch.randint(1, 64, (1,), generator=generator))
        try:
            caches.open(f"s{number}", span=SPAN, batch=1, max_length=length, version="live")
            opened[f"s{number}"] = length
        except CacheFull:
            caches.close(gone := sorted(opened)[length % len(opened)])
            del opened[gone]
        steps = {name: min(most, 1 + (number % 7)) for name, most in opened.items()}
        requests = [StepRequest(session=n, hidden_BTD=text[:, :k], position=0) for n, k in steps.items()]
        for tokens, got in zip(steps.values(), together(caches, *requests), strict=True):
            torch.testing.assert_close(got, want[:, :tokens], rtol=1e-6, atol=1e-5)
        assert caches.allocated_bytes <= per_token * 256
    for name in opened:
        caches.close(name)
    assert (caches.allocated_bytes, caches.free_bytes) == (0, per_token * 256)


def test_a_family_that_cannot_share_passes_is_computed_alone(llama: SpanModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blocks.decoding.cache.why_not_together", lambda model, shapes: "this is a test")
    caches = open_three(llama)
    text = inputs(1, 9)
    requests = [
        StepRequest(session=name, hidden_BTD=text[:, :end], position=0)
        for name, end in zip("abc", (8, 3, 5), strict=True)
    ]
    for got, end in zip(together(caches, *requests), (8, 3, 5), strict=True):
        torch.testing.assert_close(got, alone(llama, text)[:, :end], rtol=1e-6, atol=1e-5)
    (again,) = together(caches, StepRequest(session="a", hidden_BTD=text[:, 2:], position=2))
    torch.testing.assert_close(again, alone(llama, text)[:, 2:], rtol=1e-6, atol=1e-5)
    assert caches.allocated_bytes == 0


def test_a_family_whose_masks_go_wrong_is_found_out(
    llama: SpanModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from blocks.decoding.solo_cache import measure_layers

    _, shapes = measure_layers(llama)
    assert why_not_together(llama, shapes) is None
    assert "other things" in str(why_not_together(llama, None))
    monkeypatch.setattr("blocks.decoding.slot_view.SlotView.get_query_offset", lambda self, layer_idx=0: 0)
    assert "off by" in str(why_not_together(llama, shapes))
