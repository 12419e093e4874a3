"""Adapters made by hand with peft, for a tiny model: unlike each other, and far enough from zero to change texts."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from blocks.source import ModelSource
from tests.integration.swarm.reference_run import TARGETS, local_model


def save_adapter(
    source: ModelSource, directory: Path, *, seed: int, rank: int = 4, targets: tuple[str, ...] = TARGETS
) -> Path:
    """A random LoRA as `save_pretrained` writes it."""
    config = LoraConfig(r=rank, lora_alpha=6.0, target_modules=list(targets), task_type="CAUSAL_LM")
    model = get_peft_model(local_model(source), config)
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=dice) * 0.4)
    model.save_pretrained(directory)
    return directory
