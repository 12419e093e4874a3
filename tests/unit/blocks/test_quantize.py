"""Quantized spans: how much memory they take, how near they are, and whether their gradients are their own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from blocks import load as blocks_load
from blocks.adapters import LoraSettings, add_version, read_units, unit_shapes, write_units
from blocks.compute import SpanCompute
from blocks.decoding.row_versions import use_row_versions
from blocks.errors import UnsupportedModel
from blocks.load import SpanModel, load_span
from blocks.quantize import QuantizedConv1D, QuantizedLinear
from blocks.source import ModelSource, find_model
from blocks.spans import Span
from tests.logged import logged_by
from tests.unit.blocks.conftest import CPU, save_tiny

KINDS = ("int8", "nf4")
SPAN = Span(1, 4)
HIDDEN_BTD = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(2))
GRAD_BTD = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return tiny(request.param, tmp_path_factory.mktemp(request.param))


def tiny(family: str, directory: Path) -> ModelSource:
    save_tiny(family, directory)
    return find_model(str(directory), cache_dir=directory / "cache")


def load(source: ModelSource, kind: str | None, dtype: torch.dtype = torch.float32) -> SpanModel:
    return load_span(source, SPAN, dtype=dtype, device=CPU, quantize=kind)  # type: ignore[arg-type]


def num_bytes(model: SpanModel) -> int:
    """What the blocks take, less the lookup tables: 1 KB a matrix, which only beside tiny matrices is much."""
    return sum(
        tensor.nbytes
        for layer in model.cut.held.values()
        for tensors in (layer.named_parameters(), layer.named_buffers())
        for name, tensor in tensors
        if not name.endswith("table_256")
    )


def quantized_modules(model: SpanModel) -> Iterator[tuple[str, QuantizedLinear | QuantizedConv1D]]:
    for name, module in model.module.named_modules():
        if isinstance(module, (QuantizedLinear, QuantizedConv1D)):
            yield name, module


def with_the_same_values(source: ModelSource, quantized: SpanModel) -> SpanModel:
    """An ordinary span whose weights are what the quantized one computes with."""
    plain = load(source, None)
    for name, module in quantized_modules(quantized):
        target = plain.module.get_submodule(name)
        assert type(target) in (nn.Linear, Conv1D)
        target.weight = nn.Parameter(module.weight.clone(), requires_grad=False)  # type: ignore[assignment]
    return plain


def trained(model: SpanModel) -> SpanCompute:
    compute = SpanCompute(model, LoraSettings(rank=4, seed=1))
    units = read_units(model)
    write_units(model, {unit: {n: t + 0.03 for n, t in tensors.items()} for unit, tensors in units.items()})
    return compute


def passes(compute: SpanCompute) -> dict[str, Tensor]:
    output_BTD, stash = compute.forward_train(HIDDEN_BTD, span=SPAN, mask_BT=None, seed=0, keep_graph=True)
    grad_BTD, units = compute.backward(stash, GRAD_BTD)
    named = {f"{unit}.{name}": tensor for unit, tensors in units.items() for name, tensor in tensors.items()}
    return {"output": output_BTD, "input gradient": grad_BTD, **named}


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.28), ("nf4", 0.18)])
def test_the_weights_of_a_span_take_a_fraction_of_their_memory(source: ModelSource, kind: str, share: float) -> None:
    assert num_bytes(load(source, kind)) < share * num_bytes(load(source, None))


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.01), ("nf4", 0.12)])
def test_values_stay_near_the_weights(source: ModelSource, kind: str, bound: float) -> None:
    plain = load(source, None)
    found = list(quantized_modules(load(source, kind)))
    assert len(found) == len(SPAN) * (4 if "gpt2" in source.name else 7)
    for name, module in found:
        weight = plain.module.get_submodule(name).weight
        assert torch.norm(module.weight - weight) < bound * torch.norm(weight), name


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.01), ("nf4", 0.2)])
def test_outputs_stay_near_those_of_the_plain_span(source: ModelSource, kind: str, bound: float) -> None:
    with torch.no_grad():
        want, got = (load(source, one).forward(HIDDEN_BTD, span=SPAN) - HIDDEN_BTD for one in (None, kind))
    assert 0 < torch.norm(got - want) < bound * torch.norm(want)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_values_it_computes_with(source: ModelSource, kind: str) -> None:
    quantized = load(source, kind)
    want = passes(trained(with_the_same_values(source, quantized)))
    compute = trained(quantized)
    compute.forward_eval(HIDDEN_BTD, span=SPAN, mask_BT=None, version="live")  # a pass without gradients comes first
    got = passes(compute)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_spans_compute_in_bf16(source: ModelSource, kind: str) -> None:
    quantized = load(source, kind, torch.bfloat16)
    got, want = passes(trained(quantized)), passes(trained(load(source, None)))
    assert quantized.dtype == torch.bfloat16
    assert torch.cosine_similarity(got["output"].flatten(), want["output"].flatten(), dim=0) > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_a_kept_graph_holds_no_copy_of_the_weights(source: ModelSource, kind: str) -> None:
    plain, quantized = (trained(load(source, one)).graph_bytes_per_token() for one in (None, kind))
    assert quantized <= plain * 1.1


def test_adapters_and_mixed_rows_are_as_on_a_plain_span(source: ModelSource) -> None:
    quantized = load(source, "int8")
    trained(quantized)
    plain = load(source, None)
    SpanCompute(plain, LoraSettings(rank=4, seed=1))
    assert unit_shapes(quantized) == unit_shapes(plain)
    add_version(quantized, "old", read_units(plain))
    with torch.no_grad(), use_row_versions(quantized, ["live", "old"]):
        mixed_BTD = quantized.forward(HIDDEN_BTD, span=SPAN)
    with torch.no_grad(), use_row_versions(quantized, ["old", "old"]):
        old_BTD = quantized.forward(HIDDEN_BTD, span=SPAN)
    torch.testing.assert_close(mixed_BTD[1], old_BTD[1])
    assert not torch.allclose(mixed_BTD[0], old_BTD[0])


def test_what_stays_unquantized_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tiny("mixtral", tmp_path)
    with caplog.at_level(logging.WARNING, logger="blocks.load"):
        load(source, "int8")
    assert [line.count("mlp.gate.weight") for line in logged_by(blocks_load, caplog)] == [1]


def test_a_span_without_linear_weights_is_refused(llama_source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blocks.quantize._MIN_OUTPUTS", 1 << 30)
    with pytest.raises(UnsupportedModel, match="leave out --quantize"):
        load(llama_source, "int8")
