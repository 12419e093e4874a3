"""Forward and backward through a span: replays, recomputation, dtypes."""

from __future__ import annotations

import pytest
import torch

from blocks.adapters import LoraSettings, add_version, parameters_by_unit, read_units, write_units
from blocks.compute import SpanCompute
from blocks.errors import BadAdapter, BadSession, BadSpan
from blocks.load import load_span
from blocks.source import ModelSource
from blocks.spans import Span
from tests.unit.blocks.conftest import CPU

HIDDEN_BTD = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2))
GRAD_BTD = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3))
MASK_BT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def make_compute(
    source: ModelSource, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32, blocks: tuple[int, int] = (1, 5)
) -> SpanCompute:
    compute = SpanCompute(
        load_span(source, Span(*blocks), dtype=dtype, device=CPU), LoraSettings(rank=4, seed=1, dropout=dropout)
    )
    write_units(
        compute.model,
        {unit: {n: t + 0.03 for n, t in tensors.items()} for unit, tensors in read_units(compute.model).items()},
    )
    return compute


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_gives_the_gradient_of_the_kept_graph(llama_source: ModelSource, dropout: float) -> None:
    compute = make_compute(llama_source, dropout=dropout)
    results = []
    for keep_graph in (True, False):
        output_BTD, stash = compute.forward_train(
            HIDDEN_BTD, span=Span(2, 4), mask_BT=MASK_BT, seed=9, keep_graph=keep_graph
        )
        torch.manual_seed(keep_graph)
        results.append((output_BTD, *compute.backward(stash, GRAD_BTD)))
    (one, grad_one, units_one), (two, grad_two, units_two) = results
    assert torch.equal(one, two)
    assert torch.equal(grad_one, grad_two)
    assert list(units_one) == list(units_two) == ["default/block.2", "default/block.3"]
    assert all(torch.equal(units_one[u][n], units_two[u][n]) for u in units_one for n in units_one[u])


def test_dropout_is_the_seeds_and_the_same_at_another_host(llama_source: ModelSource) -> None:
    one = make_compute(llama_source, dropout=0.3)
    other = make_compute(llama_source, dropout=0.3, blocks=(2, 6))
    torch.manual_seed(0)
    first, _ = one.forward_train(HIDDEN_BTD, span=Span(2, 4), mask_BT=None, seed=9, keep_graph=False)
    torch.manual_seed(1)
    again, _ = other.forward_train(HIDDEN_BTD, span=Span(2, 4), mask_BT=None, seed=9, keep_graph=True)
    differs, _ = one.forward_train(HIDDEN_BTD, span=Span(2, 4), mask_BT=None, seed=10, keep_graph=False)
    assert torch.equal(first, again)
    assert not torch.equal(first, differs)


def test_dropout_is_off_outside_training_and_leaves_others_dice_alone(llama_source: ModelSource) -> None:
    compute = make_compute(llama_source, dropout=0.3)
    plain = make_compute(llama_source)
    torch.manual_seed(4)
    want = torch.rand(2)
    torch.manual_seed(4)
    compute.forward_train(HIDDEN_BTD, span=Span(2, 4), mask_BT=None, seed=9, keep_graph=True)
    assert torch.equal(torch.rand(2), want)
    got = compute.forward_eval(HIDDEN_BTD, span=Span(2, 4), mask_BT=None, version="live")
    assert torch.equal(got, plain.forward_eval(HIDDEN_BTD, span=Span(2, 4), mask_BT=None, version="live"))


def test_evaluation_uses_the_version_asked_for_and_training_goes_on_with_live(llama_source: ModelSource) -> None:
    compute = make_compute(llama_source)
    live = compute.forward_eval(HIDDEN_BTD, span=Span(1, 5), mask_BT=None, version="live")
    zero = {u: {n: torch.zeros_like(t) for n, t in named.items()} for u, named in read_units(compute.model).items()}
    add_version(compute.model, "round-0", zero)
    assert not torch.equal(live, compute.forward_eval(HIDDEN_BTD, span=Span(1, 5), mask_BT=None, version="round-0"))
    trained, stash = compute.forward_train(HIDDEN_BTD, span=Span(1, 5), mask_BT=None, seed=1, keep_graph=True)
    assert torch.equal(trained, live)
    compute.forward_eval(HIDDEN_BTD, span=Span(1, 5), mask_BT=None, version="round-0")
    _, by_unit = compute.backward(stash, GRAD_BTD)
    assert all(gradient.abs().sum() > 0 for named in by_unit.values() for gradient in named.values())
    with pytest.raises(BadAdapter):
        compute.forward_eval(HIDDEN_BTD, span=Span(1, 5), mask_BT=None, version="never")


def test_bf16_blocks_take_and_give_fp32_at_the_edges(llama_source: ModelSource) -> None:
    exact, half = make_compute(llama_source), make_compute(llama_source, dtype=torch.bfloat16)
    outputs = []
    for compute in (exact, half):
        output_BTD, stash = compute.forward_train(HIDDEN_BTD, span=Span(1, 5), mask_BT=None, seed=1, keep_graph=True)
        grad_BTD, by_unit = compute.backward(stash, GRAD_BTD)
        assert output_BTD.dtype == grad_BTD.dtype == torch.float32
        assert all(gradient.dtype == torch.float32 for named in by_unit.values() for gradient in named.values())
        outputs.append((output_BTD, grad_BTD))
    for got, want in zip(outputs[1], outputs[0], strict=True):
        assert torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.999
    assert all(p.dtype == torch.float32 for named in parameters_by_unit(half.model).values() for p in named.values())


def test_a_stash_says_its_size(llama_source: ModelSource) -> None:
    compute = make_compute(llama_source)
    _, kept = compute.forward_train(HIDDEN_BTD, span=Span(1, 5), mask_BT=None, seed=1, keep_graph=True)
    _, part = compute.forward_train(HIDDEN_BTD, span=Span(1, 2), mask_BT=None, seed=1, keep_graph=True)
    _, bare = compute.forward_train(HIDDEN_BTD, span=Span(1, 5), mask_BT=None, seed=1, keep_graph=False)
    assert bare.num_bytes == HIDDEN_BTD.numel() * 4
    assert kept.num_bytes > part.num_bytes > bare.num_bytes


def test_what_does_not_fit_is_refused(llama_source: ModelSource) -> None:
    compute = make_compute(llama_source)
    with pytest.raises(BadSpan):
        compute.forward_train(HIDDEN_BTD, span=Span(0, 3), mask_BT=None, seed=1, keep_graph=True)
    _, stash = compute.forward_train(HIDDEN_BTD, span=Span(1, 3), mask_BT=None, seed=1, keep_graph=True)
    with pytest.raises(BadSession, match="gradient"):
        compute.backward(stash, GRAD_BTD[:, :3])
    assert compute.backward(stash, GRAD_BTD)[0].shape == HIDDEN_BTD.shape


def test_the_callers_tensor_does_not_become_part_of_a_graph(llama_source: ModelSource) -> None:
    compute = make_compute(llama_source)
    hidden_BTD = HIDDEN_BTD.clone()
    compute.forward_train(hidden_BTD, span=Span(1, 3), mask_BT=None, seed=1, keep_graph=True)
    assert not hidden_BTD.requires_grad
