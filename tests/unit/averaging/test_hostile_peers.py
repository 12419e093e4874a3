"""Eight peers train one small adapter together while two of them send nonsense, or one combines it falsely."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from averaging.averager import Averager, RoundOutcome
from averaging.bans import Bans
from averaging.config import AveragingConfig
from averaging.exchange import Brought, Call, Version
from averaging.merging import UnitView
from averaging.recipe import Recipe
from averaging.unit_round import UnitInput
from blocks.spans import unit_of
from blocks.training.optimizer import OptimizerConfig
from blocks.training.unit_steps import DueStep, UnitSteps
from peers.network import PeerId
from tests.fakes_parts import Change, PartExchange, Table

PEERS = tuple(PeerId(f"peer{index}") for index in range(8))
BAD = PEERS[2], PEERS[5]
UNITS = [unit_of("default", block) for block in range(4)]
WIDTH, RANK, STEPS, ROUNDS = 24, 4, 5, 10


class Pupil:
    """One peer: four layers with a LoRA each on fixed weights, and data of its own kind."""

    def __init__(self, index: int) -> None:
        fixed = torch.Generator().manual_seed(1)
        self.weights = [torch.eye(WIDTH) + 0.1 * torch.randn(WIDTH, WIDTH, generator=fixed) for _ in UNITS]
        targets = [weight + 0.25 * torch.randn(WIDTH, RANK, generator=fixed) @ torch.randn(RANK, WIDTH, generator=fixed)
                   for weight in self.weights]  # fmt: skip
        self.anchor = {
            unit: {"q.lora_A": torch.randn(RANK, WIDTH, generator=fixed) / 5, "q.lora_B": torch.zeros(WIDTH, RANK)}
            for unit in UNITS
        }
        self.live = {
            unit: {name: nn.Parameter(tensor.clone()) for name, tensor in tensors.items()}
            for unit, tensors in self.anchor.items()
        }
        self.version = Version()
        self.round = 0
        own = torch.Generator().manual_seed(10 + index)
        kind = 1 + 0.5 * torch.randn(WIDTH, generator=own)  # each has its own mixture of inputs
        self.inputs = torch.randn(96, WIDTH, generator=own) * kind
        self.outputs = self._through(self.inputs, targets)
        self._steps = UnitSteps(self.live, OptimizerConfig(learning_rate=0.01))

    def train(self) -> None:
        for _ in range(STEPS):
            loss = self.loss()
            names = [(unit, name) for unit in UNITS for name in self.live[unit]]
            gradients = torch.autograd.grad(loss, [self.live[unit][name] for unit, name in names])
            by_unit: dict = {unit: {} for unit in UNITS}
            for (unit, name), gradient in zip(names, gradients, strict=True):
                by_unit[unit][name] = gradient
            self._steps.add(by_unit)
            self._steps.step([DueStep(unit=unit, tokens=1, samples=1) for unit in UNITS])

    def loss(self) -> torch.Tensor:
        mixed = [
            weight + self.live[unit]["q.lora_B"] @ self.live[unit]["q.lora_A"]
            for weight, unit in zip(self.weights, UNITS, strict=True)
        ]
        return (self._through(self.inputs, mixed) - self.outputs).square().mean()

    def given(self) -> dict:
        return {
            unit: UnitInput(
                view=UnitView(
                    unit=unit,
                    round=self.round,
                    live={name: tensor.detach().clone() for name, tensor in tensors.items()},
                    anchor=self.anchor[unit],
                    outer={},
                    scaling=1.0,
                )
            )
            for unit, tensors in self.live.items()
        }

    def take(self, outcome: RoundOutcome) -> None:
        """A class that was not applied leaves what is trained as it is, as at a host."""
        for unit, result in outcome.applied.items():
            self.anchor[unit] = dict(result.tensors)
            with torch.no_grad():
                for name, tensor in result.tensors.items():
                    self.live[unit][name].copy_(tensor)
        if outcome.applied:
            self.round = outcome.number
            self.version = Version(number=outcome.number, weight=1.0, digest=b"same bit")

    @staticmethod
    def _through(inputs: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
        hidden = inputs
        for weight in weights:
            hidden = torch.tanh(hidden @ weight.T / 2)
        return hidden


async def train_together(
    robust: str, *, sends: Mapping[PeerId, Change] | None = None, combines: Mapping[PeerId, Change] | None = None
) -> tuple[float, list[RoundOutcome]]:
    """The share of its first loss that the honest peers' mean loss falls to, and what one of them saw."""
    config = AveragingConfig(recipe=Recipe(robust=robust, weighting="equal"))
    pupils = {peer: Pupil(index) for index, peer in enumerate(PEERS)}
    honest = [pupil for peer, pupil in pupils.items() if peer not in BAD]
    bans = Bans(lambda: 0.0)
    before = torch.stack([pupil.loss() for pupil in honest]).mean().detach()
    seen = []
    for number in range(1, ROUNDS + 1):
        for pupil in pupils.values():
            pupil.train()
        table = Table(peers=PEERS, robust=robust, sends=sends or {}, combines=combines or {})

        async def one(peer: PeerId, table: Table = table, number: int = number) -> RoundOutcome:
            pupil = pupils[peer]

            async def read():
                return pupil.given()

            averager = Averager(PartExchange(table, peer), peer, "layout", config)
            units = dict.fromkeys(UNITS, Brought(samples=5.0, version=pupil.version))
            distrusts = bans.banned() - {peer}
            call = Call(begin_at=0.0, window=1.0, deadline=9.0, expected=8)
            return await averager.run_round(number, call, units, read, distrusts=distrusts)

        async with asyncio.timeout(30):
            outcomes = dict(zip(PEERS, await asyncio.gather(*[one(peer) for peer in PEERS]), strict=True))
        for peer, outcome in outcomes.items():
            pupils[peer].take(outcome)
        bans.strike(outcomes[PEERS[0]].offenders)
        seen.append(outcomes[PEERS[0]])
    after = torch.stack([pupil.loss() for pupil in honest]).mean()
    return float(after.detach() / before), seen


def inverted(values: torch.Tensor) -> torch.Tensor:
    return -3 * values


def huge(values: torch.Tensor) -> torch.Tensor:
    return torch.full_like(values, 900.0)  # below what is dropped at once


def random(values: torch.Tensor) -> torch.Tensor:
    return torch.randn(values.shape, generator=torch.Generator().manual_seed(len(values))) * 10 * values.std()


@pytest.fixture(scope="module")
def reference() -> float:
    """What eight honest peers come to with the plain mean."""
    share, seen = asyncio.run(train_together("none"))
    assert all(not outcome.offenders and not outcome.kept for outcome in seen)
    assert share < 0.5
    return share


@pytest.mark.parametrize("attack", [inverted, huge, random])
@pytest.mark.parametrize("robust", ["clip", "trimmed", "krum"])
async def test_with_two_of_eight_hostile_the_loss_falls_as_with_eight_honest(attack, robust, reference):
    share, _ = await train_together(robust, sends=dict.fromkeys(BAD, attack))
    assert (1 - share) >= 0.9 * (1 - reference)


@pytest.mark.parametrize("attack", [inverted, huge, random])
async def test_with_the_plain_mean_it_does_not(attack, reference):
    share, _ = await train_together("none", sends=dict.fromkeys(BAD, attack))
    assert not (1 - share) >= 0.9 * (1 - reference)


async def test_values_that_are_not_finite_are_dropped_and_cost_nothing_but_their_sender(reference):
    share, seen = await train_together(
        "none", sends=dict.fromkeys(BAD, lambda values: torch.full_like(values, torch.nan))
    )
    assert (1 - share) >= 0.9 * (1 - reference)
    assert seen[0].offenders == set(BAD)
    assert {entry.peer for entry in seen[1].left_out} >= set(BAD)


@pytest.mark.parametrize("lie", [lambda values: -values, lambda values: 10 * values, torch.zeros_like])
@pytest.mark.parametrize("robust", ["trimmed", "krum"])
async def test_a_reducer_that_lies_costs_one_round_and_is_banned(lie, robust, reference):
    share, seen = await train_together(robust, combines={BAD[0]: lie})
    assert seen[0].offenders == {BAD[0]}
    assert not seen[0].applied
    assert all(not outcome.kept for outcome in seen[1:])
    assert (1 - share) >= 0.9 * (1 - reference)


@pytest.mark.parametrize("robust", ["clip", "trimmed", "krum"])
async def test_among_honest_peers_nobody_is_accused(robust, reference):
    share, seen = await train_together(robust)
    assert all(not outcome.offenders and not outcome.kept for outcome in seen)
    assert (1 - share) >= 0.9 * (1 - reference)
