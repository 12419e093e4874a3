"""The run's settings in the terms of `blocks` and `averaging`: the adapter's shape, how hosts step and average."""

from __future__ import annotations

from averaging.config import AveragingConfig
from averaging.unit_round import Shapes, UnitRules
from blocks.adapters import LoraSettings
from blocks.training.local_rules import LocalRule
from blocks.training.optimizer import OptimizerConfig
from swarm.config import RunSpec
from swarm.errors import BadConfig


def lora_settings(spec: RunSpec, *, own_rank: int = 0) -> LoraSettings:
    """The run's adapter; a host may train a smaller rank of its own where the merging rule allows it.

    Raises:
        BadConfig: it does not.
    """
    adapter = spec.adapter
    if own_rank not in (0, adapter.lora_rank) and spec.rounds.merging != "power":
        raise BadConfig(
            f"this host's rank {own_rank} is not the run's {adapter.lora_rank}; only rounds.merging = 'power' merges "
            f"adapters of different ranks, and this run has '{spec.rounds.merging}': leave --lora-rank out"
        )
    return LoraSettings(
        name=adapter.name,
        rank=adapter.lora_rank,
        alpha=adapter.lora_alpha,
        dropout=adapter.lora_dropout,
        targets="auto" if adapter.auto_targets else adapter.lora_targets,
        seed=adapter.seed,
        own_rank=0 if own_rank == adapter.lora_rank else own_rank,
    )


def optimizer_config(spec: RunSpec) -> OptimizerConfig:
    """The run's optimizer and schedule."""
    training, rounds = spec.training, spec.rounds
    return OptimizerConfig(
        learning_rate=training.learning_rate,
        warmup_samples=training.warmup_samples,
        total_samples=training.total_samples,
        schedule=training.schedule,
        weight_decay=training.weight_decay,
        clip_norm=training.clip_norm,
        local=LocalRule(
            proximal=rounds.proximal if rounds.local == "fedprox" else 0.0, control=rounds.local == "scaffold"
        ),
    )


def averaging_config(spec: RunSpec) -> AveragingConfig:
    """When the run's rounds begin, and by which rules."""
    rounds = spec.rounds
    return AveragingConfig(
        round_samples=rounds.round_samples, round_seconds=rounds.round_seconds, recipe=rounds.recipe()
    )


def unit_rules(spec: RunSpec, shapes: Shapes) -> UnitRules:
    """What the run's rounds do to one unit; `shapes` are those of the run's whole adapter."""
    return UnitRules(spec.rounds.recipe(), seed=spec.adapter.seed, rank=spec.adapter.lora_rank, shapes=shapes)
