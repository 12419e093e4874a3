"""What AdamW's moments say of gradients, and moments made of what several holders say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from blocks.spans import UnitId
from blocks.training.moments import ESTIMATES, from_estimates, parse_moments, to_estimates
from blocks.training.optimizer import OptimizerConfig, UnitOptimizer
from blocks.training.unit_steps import DueStep, UnitSteps

NAMES = ("a.A", "a.B")
RATE = 1e-2


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.zeros(3, 4, dtype=dtype)) for name in NAMES}


def gradients(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(3, 4, generator=generator) for name in NAMES}


def stepped(num_steps: int, *, seed: int = 0, scale: float = 1.0) -> UnitOptimizer:
    optimizer = UnitOptimizer(parameters(), OptimizerConfig(learning_rate=RATE))
    for step in range(num_steps):
        optimizer.step({name: scale * g for name, g in gradients(100 * seed + step).items()}, samples=0)
    return optimizer


@pytest.mark.parametrize("num_steps", [1, 7, 3000])
def test_of_a_gradient_that_never_changes_they_are_itself_and_its_size_after_any_number_of_steps(
    num_steps: int,
) -> None:
    optimizer = UnitOptimizer(parameters(), OptimizerConfig(learning_rate=RATE))
    for _ in range(num_steps):
        optimizer.step(gradients(1), samples=0)
    found = optimizer.estimates()
    assert found.keys() == {f"{name}/{kind}" for name in NAMES for kind in ESTIMATES}
    for name, gradient in gradients(1).items():
        torch.testing.assert_close(found[f"{name}/mean"], gradient, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found[f"{name}/rms"], gradient.abs(), rtol=1e-4, atol=1e-6)


def test_before_a_step_there_is_nothing_to_say() -> None:
    assert UnitOptimizer(parameters(), OptimizerConfig()).estimates() == {}


@pytest.mark.parametrize("num_steps", [1, 40])
def test_ones_own_estimates_change_nothing(num_steps: int) -> None:
    optimizer, alike = stepped(num_steps), stepped(num_steps)
    before = optimizer.read()
    optimizer.take_estimates(optimizer.estimates())
    for key, tensor in optimizer.read().items():
        kind = key.rpartition("/")[2]
        mean = before[key.replace("exp_avg_sq", "exp_avg")]
        if kind == "exp_avg_sq" and num_steps == 40:  # where the mean is above the rms, the square gives way
            keeps = tensor <= before[key] * (1 + 1e-5)
            assert bool((keeps | (mean.square() * 1.2 > before[key] * 10)).all())
            torch.testing.assert_close(tensor[keeps], before[key][keeps], rtol=1e-5, atol=1e-12)
        else:
            torch.testing.assert_close(tensor, before[key], rtol=1e-5, atol=1e-9)
    assert alike.read()["a.A/step"] == optimizer.read()["a.A/step"]


def test_peers_that_average_them_step_as_a_plain_adamw_with_averaged_moments() -> None:
    """Three peers of other gradients and numbers of steps; the reference is written out in fp64."""
    num_steps, (beta, other) = (4, 4, 9), (0.9, 0.999)
    unit = UnitId("default/block.0")
    peers = []
    for place, count in enumerate(num_steps):
        steps = UnitSteps({unit: parameters()}, OptimizerConfig(learning_rate=RATE))
        for step in range(count):
            steps.add({unit: gradients(100 * place + step)})
            steps.step([DueStep(unit=unit, tokens=1, samples=0)])
        peers.append(steps)
    said = [steps.estimates(unit) for steps in peers]
    mean = {key: torch.stack([one[key] for one in said]).mean(0) for key in said[0]}
    for steps in peers:
        steps.take_estimates({unit: mean})
    for name in NAMES:
        firsts, roots = [], []
        for place, count in enumerate(num_steps):
            first = second = torch.zeros(3, 4).double()
            for step in range(count):
                gradient = gradients(100 * place + step)[name].double()
                first, second = beta * first + (1 - beta) * gradient, other * second + (1 - other) * gradient**2
            firsts.append(first / (1 - beta**count))
            roots.append((second / (1 - other**count)).sqrt())
        first, root = sum(firsts) / 3, sum(roots) / 3
        assert bool((first.abs() < root).all()), "or the bound on means would show"
        for steps, count in zip(peers, num_steps, strict=True):
            moments = steps.read_moments()[unit]
            torch.testing.assert_close(
                moments[f"{name}/exp_avg"].double(), first * (1 - beta**count), rtol=1e-6, atol=1e-6
            )
            torch.testing.assert_close(
                moments[f"{name}/exp_avg_sq"].double(), root**2 * (1 - other**count), rtol=1e-5, atol=1e-9
            )


@pytest.mark.parametrize("has_state", [False, True])
def test_who_never_stepped_goes_on_from_what_the_others_know(has_state: bool) -> None:
    newcomer, said = UnitOptimizer(parameters(), OptimizerConfig(learning_rate=RATE)), stepped(20).estimates()
    if has_state:  # as another holder may have sent it
        newcomer.write({key: torch.zeros_like(tensor) for key, tensor in stepped(1).read().items()})
    newcomer.take_estimates(said)
    found = newcomer.estimates()
    for key, tensor in said.items():
        expected = torch.maximum(tensor, said[key.replace("/rms", "/mean")].abs()) if key.endswith("rms") else tensor
        torch.testing.assert_close(found[key], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("mean", "rms"), [(1000.0, 0.0), (1000.0, 1e-30), (-1000.0, -1000.0), (1e-30, 0.0), (0.0, 0.0), (0.0, 1000.0)]
)
@pytest.mark.parametrize("num_steps", [0, 1, 500])
def test_whatever_a_codec_or_a_forger_says_no_value_moves_further_than_adamw_could(
    mean: float, rms: float, num_steps: int
) -> None:
    optimizer = stepped(num_steps, scale=1e-3)
    optimizer.take_estimates(
        {f"{n}/{k}": torch.full((3, 4), v) for n in NAMES for k, v in (("mean", mean), ("rms", rms))}
    )
    state = optimizer.read()
    parse_moments(parameters(), state)
    held = parameters()
    other = UnitOptimizer(held, OptimizerConfig(learning_rate=RATE))
    other.write(state)
    other.step({name: torch.zeros(3, 4) for name in NAMES}, samples=0)
    assert all(float(each.detach().abs().max()) <= RATE * 1.1 for each in held.values())


def test_they_are_fp32_and_moments_are_as_the_parameters() -> None:
    held = parameters(torch.bfloat16)
    optimizer = UnitOptimizer(held, OptimizerConfig(learning_rate=RATE))
    optimizer.step(gradients(3), samples=0)
    said = optimizer.estimates()
    assert {tensor.dtype for tensor in said.values()} == {torch.float32}
    made = from_estimates(held, said, {})
    assert {made[name][key].dtype for name in NAMES for key in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}


def test_what_only_half_came_is_left() -> None:
    assert from_estimates(parameters(), {"a.A/mean": torch.ones(3, 4), "b.C/rms": torch.ones(3, 4)}, {}) == {}
    assert to_estimates({}) == {}
