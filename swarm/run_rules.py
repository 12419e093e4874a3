"""The run's settings in the terms of `blocks`: how the adapter is shaped, how hosts step."""

from __future__ import annotations

from blocks.adapters import LoraSettings
from blocks.optimizer import OptimizerConfig
from swarm.config import RunSpec


def lora_settings(spec: RunSpec) -> LoraSettings:
    """The run's adapter."""
    adapter = spec.adapter
    return LoraSettings(
        name=adapter.name,
        rank=adapter.lora_rank,
        alpha=adapter.lora_alpha,
        dropout=adapter.lora_dropout,
        targets="auto" if adapter.auto_targets else adapter.lora_targets,
        seed=adapter.seed,
    )


def optimizer_config(spec: RunSpec) -> OptimizerConfig:
    """The run's optimizer and schedule."""
    training = spec.training
    return OptimizerConfig(
        learning_rate=training.learning_rate,
        warmup_samples=training.warmup_samples,
        total_samples=training.total_samples,
        schedule=training.schedule,
        weight_decay=training.weight_decay,
        clip_norm=training.clip_norm,
    )
