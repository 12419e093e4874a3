"""A host finds out by itself whether backward is right on its device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from blocks.adapters import LoraSettings, read_units
from blocks.compute import SpanCompute
from blocks.errors import WrongGradient
from blocks.load import load_span
from blocks.self_check import check_gradients, spread
from blocks.source import ModelSource, find_model
from blocks.spans import Span
from tests.errors_page import met
from tests.unit.blocks.conftest import CPU, save_tiny

SPAN = Span(1, 4)


class Broken(torch.autograd.Function):
    """A kernel whose forward is right and whose backward is a little too large."""

    @staticmethod
    def forward(ctx: object, output: Tensor) -> Tensor:
        return output.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * 1.5


def broken(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return Broken.apply(output)


def compute_of(source: ModelSource, dtype: torch.dtype, quantize: str | None = None) -> SpanCompute:
    model = load_span(source, SPAN, dtype=dtype, device=CPU, quantize=quantize)  # type: ignore[arg-type]
    for parameter in model.module.parameters():
        if parameter.dim() == 2 and parameter.is_floating_point() and quantize is None:
            parameter.mul_(6.0)  # random weights are so small that the residual is nearly all of the output
    return SpanCompute(model, LoraSettings(rank=4, seed=1, dropout=0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", [None, "int8", "nf4"])
def test_a_right_gradient_passes_and_the_adapter_stays_to_the_bit(
    llama_source: ModelSource, dtype: torch.dtype, quantize: str | None
) -> None:
    compute = compute_of(llama_source, dtype, quantize)
    before = read_units(compute.model)
    check_gradients(compute)
    after = read_units(compute.model)
    assert all(torch.equal(before[unit][name], after[unit][name]) for unit in before for name in before[unit])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["mlp.down_proj", "self_attn.o_proj", "self_attn.v_proj"])
def test_a_broken_backward_is_refused_by_its_block(llama_source: ModelSource, dtype: torch.dtype, place: str) -> None:
    compute = compute_of(llama_source, dtype)
    compute.model.cut.held[2].get_submodule(place).register_forward_hook(broken)
    with pytest.raises(WrongGradient, match=r"^the gradient of block 2 on cpu .* is off by 0\.\d+, ") as caught:
        check_gradients(compute)
    met("the gradient of block", caught.value)


def test_a_lora_without_gradients_is_refused(llama_source: ModelSource) -> None:
    compute = compute_of(llama_source, torch.float32)
    target = compute.model.cut.held[3].get_submodule("self_attn.v_proj.lora_B.live")
    target.register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(WrongGradient, match="block 3"):
        check_gradients(compute)


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_families_with_sharp_norms_and_routers_pass(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    save_tiny(family, tmp_path)
    check_gradients(compute_of(find_model(str(tmp_path), cache_dir=tmp_path / "cache"), dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reversed_gradients_among_experts_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    save_tiny("mixtral", tmp_path)
    compute = compute_of(find_model(str(tmp_path), cache_dir=tmp_path / "cache"), dtype)
    for place in ("self_attn.o_proj", "mlp"):
        module = compute.model.cut.held[2].get_submodule(place)
        module.register_forward_hook(lambda module, args, output: 2.0 * output.detach() - output)
    with pytest.raises(WrongGradient, match="block 2"):
        check_gradients(compute)


def test_a_long_span_is_checked_at_eight_blocks_from_end_to_end() -> None:
    assert spread(Span(3, 6)) == [3, 4, 5]
    assert spread(Span(10, 40)) == [10, 14, 18, 22, 27, 31, 35, 39]
