"""AdamW's moments: checked where they come from outside, and as estimates that several holders can average. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from blocks.errors import BadAdapter

MOMENTS = ("exp_avg", "exp_avg_sq")
Moments = dict[str, dict[str, torch.Tensor]]
"""By tensor name, then by moment: checked state of one unit's AdamW."""

STEP = "step"
BETAS = (0.9, 0.999)  # AdamW's usual ones
ESTIMATES = ("mean", "rms")
# By Cauchy-Schwarz |mean| <= (1-b1) / sqrt((1-b2) (1-b1^2/b2)) * sqrt(square) = 7.27 sqrt(square) for AdamW's default
# betas, and averages of peers keep that; the floor covers squares that underflow. A forged pair beyond it would throw
# the parameters to infinity in one step.
_MEAN_BOUND = 8.0
_MEAN_FLOOR = 1e-16
_SETTLED_STEPS = 1000.0  # 1 / (1 - b2): as far back as the second moment remembers
_MOST = 500.0  # a gradient beyond is none that can be learnt from, and rounds take no value beyond 1,000


def parse_moments(parameters: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> Moments:
    """Check optimizer state from outside against the tensors that it belongs to; it takes their devices and dtypes.

    Raises:
        BadAdapter: a tensor is missing, misshapen, not finite, or not what AdamW can come to.
    """
    known = {key.rpartition("/")[0] for key in state}
    return {name: _checked(name, parameter, state) for name, parameter in parameters.items() if name in known}


def _checked(name: str, parameter: torch.Tensor, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    moments: dict[str, torch.Tensor] = {}
    for moment in MOMENTS:
        tensor = state.get(f"{name}/{moment}")
        if tensor is None or tensor.shape != parameter.shape or tensor.is_complex():
            raise BadAdapter(f"optimizer state of {name} ({moment}) is missing or misshapen")
        moments[moment] = tensor.detach().to(parameter.device, parameter.dtype, copy=True)
        if not bool(torch.isfinite(moments[moment]).all()):
            raise BadAdapter(f"optimizer state of {name} ({moment}) is not finite")
    mean, square = moments["exp_avg"], moments["exp_avg_sq"]
    if bool((square < 0).any()) or bool((mean.abs() > _MEAN_BOUND * square.sqrt() + _MEAN_FLOOR).any()):
        raise BadAdapter(f"optimizer state of {name} has moments that AdamW cannot come to")
    step = state.get(f"{name}/{STEP}")
    if step is None or step.numel() != 1 or step.is_complex() or not 0 <= float(step) < 1e9:
        raise BadAdapter(f"optimizer state of {name} has no valid step count")
    moments[STEP] = torch.tensor(float(step))
    return moments


def to_estimates(moments: Moments, betas: tuple[float, float] = BETAS) -> dict[str, torch.Tensor]:
    """`TENSOR/mean` and `TENSOR/rms` of its gradients, as far as the moments remember; fp32 on the CPU, finite.

    Adam's own correction is made, so that estimates after few steps count as much as others. A root in place of the
    square, which for small gradients is nothing in fp16 or next to a large one in 8 bits.
    """
    found: dict[str, torch.Tensor] = {}
    for name, state in moments.items():
        first, second = _corrections(state[STEP], betas)
        mean, square = (state[moment].detach().to("cpu", torch.float32) for moment in MOMENTS)
        found[f"{name}/mean"] = _bounded(mean / first)
        found[f"{name}/rms"] = _bounded((square / second).sqrt())
    return found


def from_estimates(
    parameters: Mapping[str, torch.Tensor],
    estimates: Mapping[str, torch.Tensor],
    before: Moments,
    betas: tuple[float, float] = BETAS,
) -> Moments:
    """Moments that say what `estimates` say, as old as those `before`; on the parameters' devices and in their dtypes.

    What was never stepped here has no age: it takes the estimates as they are. A codec may leave nothing of an rms that
    is small next to its neighbours', which would make its next steps long: there this peer's own estimates stay, or
    else the least rms of the tensor holds. No mean is above its rms, whatever a codec or a forger made of the two.
    """
    own = to_estimates(before, betas)
    found: Moments = {}
    for name, parameter in parameters.items():
        mean, rms = (estimates.get(f"{name}/{kind}") for kind in ESTIMATES)
        if mean is None or rms is None or not bool((rms > 0).any()):
            continue
        mean, rms, known = _bounded(mean), _bounded(rms), rms > 0
        others = rms[known].min().expand_as(rms) if f"{name}/rms" not in own else own[f"{name}/rms"]
        mean = torch.where(known, mean, own.get(f"{name}/mean", torch.zeros_like(mean)))
        rms = torch.where(known, rms, others)
        step = before[name][STEP] if name in before else torch.tensor(0.0)
        if not float(step):
            step = torch.tensor(_SETTLED_STEPS)
        first, second = _corrections(step, betas)
        square = torch.maximum(rms, mean.abs()).square()
        found[name] = {
            "exp_avg": (mean * first).to(parameter.device, parameter.dtype),
            "exp_avg_sq": (square * second).to(parameter.device, parameter.dtype),
            STEP: step,
        }
    return found


def no_moments(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Those before the first step."""
    return {moment: torch.zeros_like(parameter) for moment in MOMENTS} | {STEP: torch.tensor(0.0)}


def _bounded(estimate: torch.Tensor) -> torch.Tensor:
    return estimate.nan_to_num(0.0, _MOST, -_MOST).clamp(-_MOST, _MOST)


def _corrections(step: torch.Tensor, betas: tuple[float, float]) -> tuple[float, float]:
    """What is missing to 1 in Adam's moments after so many steps; 1 before any, where there is nothing to correct."""
    if not float(step):
        return 1.0, 1.0
    first, second = (1.0 - beta ** float(step) for beta in betas)
    return first, second
