"""The outer optimizers against torch's own and a plain loop, and outer state from a peer that means harm."""

from __future__ import annotations

import math

import pytest
import torch

from averaging.errors import BadTensors
from averaging.outer import OuterConfig, check_outer, outer_step

NESTEROV = OuterConfig(name="nesterov")
ADAM = OuterConfig(name="adam", learning_rate=0.01, tau=1e-3)


def unit(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return {"m.lora_A": torch.randn(2, 5, generator=generator), "m.lora_B": torch.randn(4, 2, generator=generator)}


def run(config, rounds, names=("m.lora_A", "m.lora_B")):
    """Anchors and state after each round, where round k merges `unit(k)`."""
    anchor, state, history = unit(0), {}, []
    for number in range(1, rounds + 1):
        anchor, state = outer_step(config, anchor, unit(number), state, names)
        history.append((anchor, state))
    return history


def test_none_takes_what_was_merged():
    merged = unit(1)
    tensors, state = outer_step(OuterConfig(), unit(0), merged, {}, merged)
    assert all(torch.equal(tensors[name], merged[name]) for name in merged)
    assert state == {}


@pytest.mark.parametrize(("learning_rate", "momentum"), [(0.7, 0.9), (1.0, 0.5), (0.3, 0.0)])
def test_nesterov_is_torchs_own(learning_rate, momentum):
    config = OuterConfig(name="nesterov", learning_rate=learning_rate, momentum=momentum)
    parameters = {name: torch.nn.Parameter(value) for name, value in unit(0).items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=learning_rate, momentum=momentum, nesterov=momentum > 0)
    for number, (found, state) in enumerate(run(config, 6), start=1):
        for name, parameter in parameters.items():
            parameter.grad = parameter.detach() - unit(number)[name]
        optimizer.step()
        for name, parameter in parameters.items():
            torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-6, atol=1e-6)
        check_outer(state, found)


def test_with_rate_one_and_no_momentum_the_step_is_what_was_merged():
    config = OuterConfig(name="nesterov", learning_rate=1.0, momentum=0.0)
    tensors, _ = outer_step(config, unit(0), unit(1), {}, unit(0))
    torch.testing.assert_close(tensors["m.lora_A"], unit(1)["m.lora_A"], rtol=1e-6, atol=1e-6)


def test_adam_is_the_loop():
    history = run(ADAM, 5)
    for name in unit(0):
        position, first, second = unit(0)[name].double().view(-1).tolist(), [0.0] * 20, [0.0] * 20
        for count, (found, state) in enumerate(history, start=1):
            target = unit(count)[name].double().view(-1).tolist()
            for i, value in enumerate(position):
                gradient = value - target[i]
                first[i] = 0.9 * first[i] + 0.1 * gradient
                second[i] = 0.99 * second[i] + 0.01 * gradient**2
                root = math.sqrt(second[i] / (1 - 0.99**count))
                position[i] = value - 0.01 * first[i] / (1 - 0.9**count) / (root + 1e-3)
            torch.testing.assert_close(found[name].view(-1), torch.tensor(position), rtol=1e-6, atol=1e-6)
            assert state[f"step/{name}"].tolist() == [count]
            check_outer(state, found)


@pytest.mark.parametrize("config", [NESTEROV, ADAM])
def test_a_tensor_that_was_not_trained_neither_moves_nor_loses_its_state(config):
    (anchor, state), merged = run(config, 2)[-1], unit(9)
    copies = {key: value.clone() for key, value in (anchor | merged | state).items()}
    tensors, after = outer_step(config, anchor, merged, state, ["m.lora_B"])
    assert torch.equal(tensors["m.lora_A"], merged["m.lora_A"])
    assert not torch.equal(tensors["m.lora_B"], merged["m.lora_B"])
    assert set(after) == set(state)
    for key, value in state.items():
        assert torch.equal(after[key], value) == key.endswith("lora_A")
    assert all(torch.equal(value, copies[key]) for key, value in (anchor | merged | state).items())
    assert tensors["m.lora_A"].data_ptr() != merged["m.lora_A"].data_ptr()


def test_the_count_of_steps_stops_where_fp32_can_count_no_further():
    anchor, state = run(ADAM, 1)[-1]
    full = state | {f"step/{name}": torch.tensor([2.0**24]) for name in anchor}
    tensors, after = outer_step(ADAM, anchor, unit(2), full, anchor)
    check_outer(after, tensors)
    assert after["step/m.lora_A"].tolist() == [2.0**24]
    assert torch.isfinite(tensors["m.lora_A"]).all()


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("velocity/m.lora_C", torch.zeros(2, 5), "no tensor of the unit"),
        ("third/m.lora_A", torch.zeros(2, 5), "no tensor of the unit"),
        ("velocity", torch.zeros(2, 5), "no tensor of the unit"),
        ("velocity/m.lora_A", torch.zeros(5, 2), "must be torch.float32"),
        ("velocity/m.lora_A", torch.zeros(2, 5).double(), "must be torch.float32"),
        ("first/m.lora_A", torch.full((2, 5), math.nan), "not finite"),
        ("velocity/m.lora_A", torch.full((2, 5), math.inf), "not finite"),
        ("second/m.lora_A", torch.full((2, 5), -1e-9), "negative"),
        ("step/m.lora_A", torch.ones(2), "must be torch.float32"),
        ("step/m.lora_A", torch.tensor([1.5]), "whole number"),
        ("step/m.lora_A", torch.tensor([0.0]), "whole number"),
        ("step/m.lora_A", torch.tensor([1e30]), "whole number"),
        ("second/m.lora_A", None, "without the rest"),
        ("step/m.lora_A", None, "without the rest"),
    ],
)
def test_state_that_cannot_belong_to_the_unit_is_refused(key, value, reason):
    anchor, state = run(ADAM, 3)[-1]
    check_outer(state, anchor)
    hostile = {name: tensor for name, tensor in state.items() if name != key}
    if value is not None:
        hostile[key] = value
    with pytest.raises(BadTensors, match=reason):
        check_outer(hostile, anchor)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"name": "sgd"}, "use one of none, nesterov, adam"),
        ({"learning_rate": 0.0}, "learning rate"),
        ({"learning_rate": math.nan}, "learning rate"),
        ({"momentum": 1.0}, "momentum"),
        ({"momentum": math.nan}, "momentum"),
        ({"tau": 0.0}, "tau"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        OuterConfig(**settings)
