"""What AdamW's moments say of gradients, and moments made of what several holders say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from averaging.codecs import make_codec
from averaging.config import AveragingConfig
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
    ("mean", "rms"),
    [
        (1000.0, 0.0),
        (1000.0, 1e-30),
        (-1000.0, -1000.0),
        (1e-30, 0.0),
        (0.0, 0.0),
        (0.0, 1000.0),
        (0.0, 1e20),
        (1e20, 1e20),
        (-1e20, 1.0),
        (math.nan, 1.0),
        (0.0, math.inf),
    ],
)
@pytest.mark.parametrize("num_steps", [0, 1, 500])
def test_whatever_a_codec_or_a_forger_says_adamw_goes_on_and_no_value_moves_further_than_it_could(
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
    other.step({name: torch.ones(3, 4) for name in NAMES}, samples=0)
    assert all(float(each.detach().abs().max()) <= RATE * 5 for each in held.values())
    assert all(bool(torch.isfinite(tensor).all()) for tensor in {**other.read(), **other.estimates()}.values())


def test_where_a_codec_left_nothing_of_an_rms_the_peers_own_stays() -> None:
    optimizer = stepped(30)
    own = optimizer.estimates()
    said = {key: torch.full_like(tensor, 0.1) for key, tensor in own.items()}
    for key in ("a.A/mean", "a.A/rms"):
        said[key][0] = 0.0
    optimizer.take_estimates(said)
    found = optimizer.estimates()
    torch.testing.assert_close(found["a.A/mean"][0], own["a.A/mean"][0], rtol=1e-4, atol=1e-6)
    least = torch.maximum(own["a.A/rms"], own["a.A/mean"].abs())[0]
    torch.testing.assert_close(found["a.A/rms"][0], least, rtol=1e-4, atol=1e-6)
    for key, rows in (("a.A/rms", slice(1, 3)), ("a.B/rms", slice(0, 3)), ("a.A/mean", slice(1, 3))):
        torch.testing.assert_close(found[key][rows], said[key][rows], rtol=1e-4, atol=1e-6)
    newcomer = UnitOptimizer(parameters(), OptimizerConfig(learning_rate=RATE))
    newcomer.take_estimates(said)
    assert float(newcomer.estimates()["a.A/rms"].min()) == pytest.approx(0.1, rel=1e-4)


def test_a_spike_that_no_round_would_take_is_told_as_one_that_it_does() -> None:
    optimizer = UnitOptimizer(parameters(), OptimizerConfig(learning_rate=RATE))
    optimizer.step({name: torch.full((3, 4), 1e18) for name in NAMES}, samples=0)
    assert all(100 < float(t.max()) < AveragingConfig().max_update for t in optimizer.estimates().values())


@pytest.mark.parametrize("codec", ["fp16", "int8"])
def test_through_a_lossy_codec_steps_stay_as_long_as_they_were(codec: str) -> None:
    """Values of a block differ by a factor of thousands, as they do where inputs have outliers."""
    generator, made = torch.Generator().manual_seed(5), make_codec(codec)
    scale_O = torch.exp(1.5 * torch.randn(4096, generator=generator)) * 1e-3
    lengths = []
    for through in (False, True):
        held = {"a.A": nn.Parameter(torch.zeros(4096))}
        optimizer = UnitOptimizer(held, OptimizerConfig(learning_rate=RATE))
        for step in range(60):
            if step == 40 and through:
                said = {key: made.decode(made.encode(t), t.numel()) for key, t in optimizer.estimates().items()}
                optimizer.take_estimates(said)
            before = held["a.A"].detach().clone()
            noise = torch.Generator().manual_seed(step)
            optimizer.step({"a.A": scale_O * torch.randn(4096, generator=noise)}, samples=0)
        lengths.append((held["a.A"].detach() - before).abs())
    plain, coded = lengths
    assert float(coded.mean()) == pytest.approx(float(plain.mean()), rel=0.05)
    assert float(coded.max()) < 2 * RATE


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
