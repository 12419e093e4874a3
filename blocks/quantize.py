"""Frozen linear weights in 8 or 4 bits: the large matrices of a span in memory, their values made when they are used.

int8 has one absmax scale for each output (Dettmers et al. 2022, without the outliers), nf4 one for each 64 weights and
sixteen levels at the quantiles of a normal distribution (QLoRA, Dettmers et al. 2023). Forward and backward both make
the values anew, so a kept graph holds no copy of the weights, and the gradient is that of the weights as they are used.

Not a library, as of late 2026: in torchao 0.18 a graph that is kept for backward holds an unpacked copy of every
weight, and nf4 is gone; in bitsandbytes 0.50 the input gradient of int8 has a cosine of .991, and that of nf4 on the
CPU is wrong without an error unless a private switch is set. peft imports either in every process where it is
installed, which takes seconds. This is torch alone and the same on every device.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

Quantization = Literal["int8", "nf4"]
BYTES_PER_WEIGHT: dict[Quantization, float] = {"int8": 1.01, "nf4": 0.54}

_NF4_BLOCK = 64
# QLoRA's levels: quantiles of a normal distribution, scaled to [-1, 1], with an exact zero.
_NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171229224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_GRID = 1 << 15  # steps of the table that finds the nearest level: off by at most one step at a border
_MIN_OUTPUTS = 17  # routers and gates are small and decide much
_CHUNK_WEIGHTS = 1 << 22


class Int8Weight(nn.Module):
    """A matrix [O, I] in int8 with a scale per row. `scale_O1` is in the dtype that the matrix had."""

    def __init__(self, weight_OI: Tensor) -> None:
        super().__init__()
        # Rounded before it is used, so that its own rounding costs nothing.
        limit_O1 = torch.linalg.vector_norm(weight_OI, float("inf"), dim=1, keepdim=True, dtype=torch.float32)
        scale_O1 = (limit_O1 / 127.0).clamp_min(torch.finfo(torch.float32).tiny).to(weight_OI.dtype)
        codes_OI = torch.empty(weight_OI.shape, dtype=torch.int8, device=weight_OI.device)
        for rows in _row_chunks(weight_OI):
            codes_OI[rows] = (
                (weight_OI[rows].float() / scale_O1[rows].float()).round_().clamp_(-127, 127).to(torch.int8)
            )
        self.scale_O1 = nn.Parameter(scale_O1, requires_grad=False)
        self.codes_OI = nn.Parameter(codes_OI, requires_grad=False)

    def values(self) -> Tensor:
        """The matrix as it is computed with, [O, I]; a new tensor."""
        return self.codes_OI.to(self.scale_O1.dtype).mul_(self.scale_O1)

    def forward(self, input: Tensor, *, transposed: bool) -> Tensor:  # noqa: A002  (torch's own name)
        """`input` [..., I] times the transpose -> [..., O]; `transposed`: [..., O] times the matrix -> [..., I]."""
        # int8 is exact in bf16, and scaling the smaller side costs less than scaling the matrix.
        codes_OI = self.codes_OI.to(input.dtype)
        scale_O = self.scale_O1.view(-1)
        return (input * scale_O) @ codes_OI if transposed else functional.linear(input, codes_OI) * scale_O


class Nf4Weight(nn.Module):
    """A matrix [O, I] in NormalFloat-4, two weights a byte, with a scale for each 64. O * I is a multiple of 64."""

    table_256: Tensor

    def __init__(self, weight_OI: Tensor) -> None:
        super().__init__()
        dtype, device = weight_OI.dtype, weight_OI.device
        blocks_NK = weight_OI.reshape(-1, _NF4_BLOCK)
        limit_N1 = torch.linalg.vector_norm(blocks_NK, float("inf"), dim=1, keepdim=True, dtype=torch.float32)
        scale_N1 = limit_N1.clamp_min(torch.finfo(torch.float32).tiny).to(dtype)
        codes_NH = torch.empty((blocks_NK.shape[0], _NF4_BLOCK // 2), dtype=torch.uint8, device=device)
        nearest = _nearest_levels().to(device)
        for rows in _row_chunks(blocks_NK):
            steps_NK = (blocks_NK[rows].float() / scale_N1[rows].float() * _GRID).round_().to(torch.int32)
            steps_NK = steps_NK.clamp_(-_GRID, _GRID).add_(_GRID)
            codes_NK = nearest.index_select(0, steps_NK.view(-1)).view(steps_NK.shape)
            codes_NH[rows] = codes_NK[:, 0::2] << 4 | codes_NK[:, 1::2]
        levels = torch.tensor(_NF4_LEVELS, dtype=dtype)
        pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1).contiguous()
        # Both weights of a byte in one integer: looking those up is five times faster than looking up rows of two.
        table = pairs.view(torch.int32 if dtype.itemsize == 2 else torch.int64).view(-1)
        self.shape = weight_OI.shape
        self.scale_N1 = nn.Parameter(scale_N1, requires_grad=False)
        self.codes = nn.Parameter(codes_NH.view(-1), requires_grad=False)
        self.register_buffer("table_256", table.to(device), persistent=False)

    def values(self) -> Tensor:
        """The matrix as it is computed with, [O, I]; a new tensor."""
        pairs = self.table_256.index_select(0, self.codes.int())
        return pairs.view(self.scale_N1.dtype).view(-1, _NF4_BLOCK).mul_(self.scale_N1).view(self.shape)

    def forward(self, input: Tensor, *, transposed: bool) -> Tensor:  # noqa: A002  (torch's own name)
        """`input` [..., I] times the transpose -> [..., O]; `transposed`: [..., O] times the matrix -> [..., I]."""
        weight_OI = self.values().to(input.dtype)
        return input @ weight_OI if transposed else functional.linear(input, weight_OI)


class _Multiply(torch.autograd.Function):
    """A product with a frozen quantized matrix. Nothing is saved: the matrix does not change."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, input: Tensor, weight: nn.Module) -> Tensor:  # noqa: A002
        ctx.weight = weight  # type: ignore[attr-defined]
        return cast(Tensor, weight(input, transposed=False))

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        weight = cast(nn.Module, ctx.weight)  # type: ignore[attr-defined]
        return cast(Tensor, weight(grads[0], transposed=True)), None


class QuantizedLinear(nn.Linear):
    """A frozen `nn.Linear` whose matrix is quantized; `weight` gives its values in a new tensor."""

    def __init__(self, linear: nn.Linear, kind: Quantization) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.quantized = _quantized(linear.weight.detach(), kind)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The values that it computes with, [out, in]."""
        return self.quantized.values()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's own name)
        """See nn.Linear."""
        output = cast(Tensor, _Multiply.apply(input, self.quantized))  # type: ignore[no-untyped-call]
        return output if self.bias is None else output + self.bias


class QuantizedConv1D(Conv1D):  # type: ignore[misc]
    """The same for GPT-2's transposed linear layer."""

    def __init__(self, linear: Conv1D, kind: Quantization) -> None:
        nn.Module.__init__(self)
        self.nf, self.nx = linear.nf, linear.nx
        self.quantized = _quantized(linear.weight.detach().T.contiguous(), kind)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """The values that it computes with, [in, out]."""
        return self.quantized.values().T

    def forward(self, x: Tensor) -> Tensor:
        """See Conv1D."""
        return cast(Tensor, _Multiply.apply(x, self.quantized)) + cast(Tensor, self.bias)  # type: ignore[no-untyped-call]


def quantize_layers(layers: Iterable[nn.Module], kind: Quantization) -> int:
    """Replace the linear modules inside `layers`, one after the other -> how many were replaced.

    Subclasses of nn.Linear are left, as their forward is their own, and so are routers, gates and odd shapes.
    """
    count = 0
    for layer in layers:
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if type(child) in (nn.Linear, Conv1D) and _is_worth_it(child):
                    wrap = QuantizedLinear if type(child) is nn.Linear else QuantizedConv1D
                    setattr(module, name, wrap(child, kind).eval())  # type: ignore[arg-type]
                    count += 1
    return count


def unquantized(layers: Iterable[nn.Module]) -> dict[str, int]:
    """Matrices and larger tensors that are as they were: bytes by name, in which block numbers are left out."""
    found: dict[str, int] = {}
    for layer in layers:
        for name, parameter in layer.named_parameters():
            if parameter.is_floating_point() and parameter.dim() > 1 and ".quantized." not in f".{name}":
                found[name] = found.get(name, 0) + parameter.numel() * parameter.element_size()
    return found


def _quantized(weight_OI: Tensor, kind: Quantization) -> Int8Weight | Nf4Weight:
    return Int8Weight(weight_OI) if kind == "int8" else Nf4Weight(weight_OI)


def _is_worth_it(linear: nn.Module) -> bool:
    weight = cast(Tensor, linear.weight)
    outputs = weight.shape[0] if isinstance(linear, nn.Linear) else weight.shape[1]
    return outputs >= _MIN_OUTPUTS and weight.numel() % _NF4_BLOCK == 0 and weight.is_floating_point()


def _row_chunks(matrix: Tensor) -> Iterable[slice]:
    """Slices of rows, so that fp32 copies stay small."""
    step = max(1, _CHUNK_WEIGHTS // matrix.shape[1])
    return (slice(start, start + step) for start in range(0, matrix.shape[0], step))


def _nearest_levels() -> Tensor:
    """The code of the nearest level for every step of [-1, 1], uint8."""
    levels = torch.tensor(_NF4_LEVELS)
    borders = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(torch.linspace(-1.0, 1.0, 2 * _GRID + 1), borders).to(torch.uint8)
