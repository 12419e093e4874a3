"""Whether backward through the blocks held here gives the gradient of their forward, on this device and in this dtype.

Kernels exist whose gradient is wrong without an error, and a wrong gradient from one host spoils everybody's adapter.
Each block is nudged along a random direction, in its input and in its LoRA, and the change of its output compared with
what backward says it should be. B: batch (one), T: tokens, D: hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blocks.adapters import LIVE, block_of, parameters_by_unit, use_version
from blocks.compute import SpanCompute
from blocks.errors import WrongGradient
from blocks.spans import Span
from blocks.targets import has_experts

_TOKENS = 8
_MAX_BLOCKS = 8  # of a span: its blocks differ in values, rarely in kernels, and a start should be quick
_LORA_STEP = 0.2  # of the step: LoRAs multiply sums over many inputs


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """`steps` are nudges for inputs of size one; `error` is how far the two may be apart, relative to their size.

    A smaller step is truer to the derivative, but the change of the output then drowns in the dtype's rounding. Several
    are tried, with other draws, before a block is said to be wrong: norms of small values bend sharply, and a router
    that chooses other experts for nudged tokens has no gradient there. A broken kernel fails with all of them. Where
    blocks have experts and the step must be large, some change in every try, which hides part of the change from the
    gradient but never all of it: `experts_error` then fails only gradients that are none, reversed or far too large.
    """

    steps: tuple[float, ...]
    error: float
    experts_error: float


_TOLERANCES = {torch.float32: Tolerance(steps=(0.01, 0.001, 0.0003, 0.0003), error=0.01, experts_error=0.5)}
_COARSE = Tolerance(steps=(0.1, 0.03, 0.2), error=0.2, experts_error=0.95)


def check_gradients(compute: SpanCompute) -> None:
    """Check blocks spread over the span; the adapter is the same to the bit afterwards. Five short passes a block.

    Raises:
        WrongGradient: a block's gradient is not that of its forward; the message names the block and the numbers.
    """
    model = compute.model
    tolerance = _TOLERANCES.get(model.dtype, _COARSE)
    allowed = tolerance.experts_error if has_experts(model.config) else tolerance.error
    use_version(model, LIVE)
    for block in spread(model.span):
        errors: list[float] = []
        for seed, step in enumerate(tolerance.steps):
            errors.append(gradient_error(compute, block, step, seed))
            if errors[-1] <= allowed:  # NaN is not
                break
        else:
            numbers = ", ".join(f"{error:.3f}" for error in errors)
            raise WrongGradient(
                f"the gradient of block {block} on {model.device} in {model.dtype} is off by {numbers} of its size in "
                f"{len(errors)} tries, where {allowed} is allowed; use another --dtype, --quantize or --device"
            )


def spread(span: Span) -> list[int]:
    """At most eight blocks of a span, the first and the last among them."""
    last = len(span) - 1
    if last < _MAX_BLOCKS:
        return list(span.blocks())
    return [span.start + round(i * last / (_MAX_BLOCKS - 1)) for i in range(_MAX_BLOCKS)]


def gradient_error(compute: SpanCompute, block: int, step: float, seed: int) -> float:
    """How far the change of one block's output is from what its gradient says, relative to that change.

    The output's change is also the direction that is sent backward, as noise then is least; what the block hands on
    unchanged (the residual) is taken off both sides, else it would hide the rest.
    """
    model = compute.model
    generator = torch.Generator().manual_seed(seed * 1_000_003 + block)

    def draw(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator).to(model.device)

    shape = torch.Size((1, _TOKENS, model.source.hidden_size))
    middle_BTD, nudge_BTD = draw(shape), draw(shape) * step
    low_BTD, high_BTD = ((middle_BTD + sign * nudge_BTD).to(model.dtype) for sign in (-1, 1))
    lora = [
        parameter
        for unit, parameters in parameters_by_unit(model).items()
        if block_of(unit) == block
        for parameter in parameters.values()
    ]
    nudges = [draw(parameter.shape) * (step * _LORA_STEP) for parameter in lora]

    def forward(input_BTD: Tensor, sign: int) -> Tensor:
        with torch.no_grad(), _nudged(lora, nudges, sign):
            return model.forward(input_BTD, span=Span(block, block + 1))

    low_out_BTD, high_out_BTD = forward(low_BTD, -1), forward(high_BTD, 1)
    moved_BTD = high_BTD.float() - low_BTD.float()
    change_BTD = high_out_BTD.float() - low_out_BTD.float() - moved_BTD
    input_BTD = middle_BTD.to(model.dtype).requires_grad_(True)
    output_BTD = model.forward(input_BTD, span=Span(block, block + 1))
    grad_BTD, *grads = torch.autograd.grad(
        output_BTD, [input_BTD, *lora], change_BTD.to(output_BTD.dtype), allow_unused=True, materialize_grads=True
    )
    told = torch.sum((grad_BTD.float() - change_BTD) * moved_BTD)
    told += sum(2.0 * torch.sum(grad.float() * nudge) for grad, nudge in zip(grads, nudges, strict=True))
    size = torch.sum(change_BTD * change_BTD)
    seen = size - _rounding(low_out_BTD) - _rounding(high_out_BTD)
    return float(torch.abs(told - seen) / size)


def _rounding(output_BTD: Tensor) -> Tensor:
    """The expected sum of squares of what rounding to its dtype added to `output_BTD`: a twelfth of a unit each."""
    ulp_BTD = torch.finfo(output_BTD.dtype).eps * torch.exp2(torch.floor(torch.log2(output_BTD.float().abs())))
    return torch.sum(ulp_BTD * ulp_BTD) / 12.0


@contextmanager
def _nudged(parameters: list[nn.Parameter], nudges: list[Tensor], sign: int) -> Iterator[None]:
    """The parameters moved inside, and as they were to the bit afterwards."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        for parameter, nudge in zip(parameters, nudges, strict=True):
            parameter.data.add_(nudge, alpha=sign)
        yield
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.data.copy_(value)
