"""AdamW per unit against torch's own, the schedules, and moments from strangers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from blocks.errors import BadAdapter
from blocks.spans import UnitId
from blocks.training.optimizer import OptimizerConfig, UnitOptimizer, learning_rate
from blocks.training.unit_steps import DueStep, UnitSteps

SHAPES = {"a.A": (4, 3), "a.B": (5, 4)}


def parameters(seed: int = 1) -> dict[str, nn.Parameter]:
    rng = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=rng)) for name, shape in SHAPES.items()}


def gradients(step: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1e6])
def test_steps_are_those_of_torch(clip_norm: float) -> None:
    config = OptimizerConfig(
        learning_rate=1e-2, weight_decay=0.1, clip_norm=clip_norm, schedule="cosine", warmup_samples=16,
        total_samples=80,
    )  # fmt: skip
    ours, theirs = parameters(), parameters()
    optimizer = UnitOptimizer(ours, config)
    adamw = torch.optim.AdamW(theirs.values(), lr=1e-2, weight_decay=0.1)
    for step in range(6):
        for name, parameter in theirs.items():
            parameter.grad = gradients(step)[name]
        norm = float(torch.nn.utils.clip_grad_norm_(theirs.values(), clip_norm or math.inf))
        adamw.param_groups[0]["lr"] = learning_rate(config, 8 * step)
        adamw.step()
        assert optimizer.step(gradients(step), samples=8 * step) == pytest.approx(norm)
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)
        assert ours[name].grad is None


def test_warm_up_climbs_and_schedules_end_at_zero() -> None:
    for schedule in ("linear", "cosine"):
        config = OptimizerConfig(learning_rate=1.0, warmup_samples=10, total_samples=110, schedule=schedule)
        climb = [learning_rate(config, samples) for samples in range(11)]
        assert climb[0] == pytest.approx(0.1)
        assert climb == sorted(climb)
        assert climb[9] == climb[10] == pytest.approx(1.0)
        assert learning_rate(config, 60) == pytest.approx(0.5)
        assert learning_rate(config, 110) == pytest.approx(0.0)
        assert learning_rate(config, 10**9) == pytest.approx(0.0)
    assert learning_rate(OptimizerConfig(learning_rate=3.0), 10**9) == 3.0


@pytest.mark.parametrize(
    "wrong", [{"schedule": "step"}, {"schedule": "linear"}, {"schedule": "cosine", "warmup_samples": 9}]
)
def test_a_schedule_without_an_end_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="training"):
        OptimizerConfig(**wrong)  # type: ignore[arg-type]


def test_moments_go_on_at_another_peer_to_the_bit() -> None:
    config = OptimizerConfig(learning_rate=1e-2)
    here, there = parameters(), parameters()
    first = UnitOptimizer(here, config)
    assert first.read() == {}
    for step in range(3):
        first.step(gradients(step), samples=0)
    second = UnitOptimizer(there, config)
    second.write({})
    for name in SHAPES:
        there[name].data.copy_(here[name].data)
    second.write(first.read())
    for optimizer in (first, second):
        optimizer.step(gradients(9), samples=0)
    for name in SHAPES:
        assert torch.equal(here[name], there[name])
    state = first.read()
    first.step(gradients(4), samples=0)
    assert not torch.equal(state["a.A/exp_avg"], first.read()["a.A/exp_avg"]), "read gives copies"


def good_state() -> dict[str, torch.Tensor]:
    optimizer = UnitOptimizer(parameters(), OptimizerConfig())
    for step in range(3):
        optimizer.step(gradients(step), samples=0)
    return optimizer.read()


@pytest.mark.parametrize(
    "wrong",
    [
        {"a.A/exp_avg": None},
        {"a.A/exp_avg": torch.zeros(3, 4)},
        {"a.A/exp_avg": torch.full((4, 3), math.nan)},
        {"a.A/exp_avg": torch.full((4, 3), 1e30)},
        {"a.B/exp_avg": torch.full((5, 4), 1e300, dtype=torch.float64)},
        {"a.B/exp_avg": torch.zeros(5, 4, dtype=torch.complex64)},
        {"a.B/exp_avg_sq": torch.full((5, 4), -1.0)},
        {"a.B/exp_avg_sq": torch.zeros(5, 4)},
        {"a.B/exp_avg_sq": torch.full((5, 4), math.inf)},
        {"a.A/step": None},
        {"a.A/step": torch.tensor([math.nan])},
        {"a.A/step": torch.tensor([-1.0])},
        {"a.A/step": torch.tensor([1.0, 2.0])},
        {"a.A/step": torch.tensor([1e12])},
    ],
    ids=str,
)
def test_moments_that_adamw_cannot_come_to_are_refused_whole(wrong: dict[str, torch.Tensor | None]) -> None:
    state = {name: tensor for name, tensor in (good_state() | wrong).items() if tensor is not None}
    steps = UnitSteps({UnitId(u): parameters() for u in ("x/block.0", "x/block.1")}, OptimizerConfig())
    with pytest.raises(BadAdapter):
        steps.write_moments({UnitId("x/block.0"): good_state(), UnitId("x/block.1"): state})
    assert not any(steps.read_moments().values()), "one bad unit must leave the others as they were"


def test_real_moments_are_within_the_bound_even_after_a_spike_and_with_tiny_gradients() -> None:
    for scale in (1e-30, 1e-20, 1e-3, 1e15):
        optimizer = UnitOptimizer(parameters(), OptimizerConfig())
        for step in range(40):
            optimizer.step({name: g * scale * (1e4 if step == 20 else 1) for name, g in gradients(step).items()},
                           samples=0)  # fmt: skip
            UnitOptimizer(parameters(), OptimizerConfig()).write(optimizer.read())


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_an_overflow_changes_nothing(clip_norm: float) -> None:
    held = parameters()
    steps = UnitSteps({UnitId("x/block.0"): held}, OptimizerConfig(clip_norm=clip_norm))
    huge = {name: torch.full(shape, 3e38) for name, shape in SHAPES.items()}
    steps.add({UnitId("x/block.0"): huge})
    steps.add({UnitId("x/block.0"): huge})
    steps.step([DueStep(unit=UnitId("x/block.0"), tokens=1, samples=0)])
    for name, parameter in parameters().items():
        assert torch.equal(held[name], parameter)
    assert not any(steps.read_moments().values())
