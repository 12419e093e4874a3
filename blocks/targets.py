"""Which modules of a block a LoRA goes on, in each family."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from blocks.errors import BadAdapter

Targets = tuple[str, ...] | Literal["auto"]

_QUERY_VALUE = ("q_proj", "v_proj")
_MAX_SHOWN = 16
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERT_NAMES = frozenset({"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


def target_names(layer: nn.Module, targets: Targets, config: PretrainedConfig) -> list[str]:
    """The linear modules of one block, by their names in it, that a LoRA on `targets` goes on.

    `auto` is peft's choice for the family, else the queries and values, else all linear modules.

    Raises:
        BadAdapter: a target names the feed-forward of a mixture of experts, which peft takes for its fused experts.
    """
    linear = _linear_names(layer)
    experts = has_experts(config)
    usable = [name for name in linear if not experts or name.rpartition(".")[2] not in _EXPERT_NAMES]
    if targets == "auto":
        default = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(str(config.model_type))
        targets = tuple(default) if isinstance(default, list) else _QUERY_VALUE
        if targets == _QUERY_VALUE and not _matching(usable, targets):
            return usable
    if experts and any(target.rpartition(".")[2] in _EXPERT_NAMES for target in targets):
        raise BadAdapter(f"adapter.targets {targets} are fused into experts in {config.model_type}; target attention")
    return _matching(usable, targets)


def check_targets(layers: Iterable[nn.Module], targets: Targets, model: str) -> None:
    """Refuse a target that is in no block: a typo would otherwise leave a smaller adapter than was meant.

    Raises:
        BadAdapter: there is one; the message names it and those that there are.
    """
    if targets == "auto":
        return
    linear = sorted({name for layer in layers for name in _linear_names(layer)})
    for target in targets:
        if not _matching(linear, (target,)):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear})[:_MAX_SHOWN])
            raise BadAdapter(f"adapter.lora_targets has '{target}', which no block of {model} has; use some of {known}")


def has_experts(config: PretrainedConfig) -> bool:
    """Whether some layers are mixtures of experts."""
    return any(getattr(config.get_text_config(), name, None) for name in _EXPERT_COUNTS)


def uses_conv1d(layer: nn.Module) -> bool:
    """Whether the family keeps its weights transposed, as GPT-2 does, which peft wants to be told."""
    return any(isinstance(module, Conv1D) for module in layer.modules())


def _linear_names(layer: nn.Module) -> list[str]:
    return [name for name, module in layer.named_modules() if isinstance(module, (nn.Linear, Conv1D))]


def _matching(names: list[str], targets: tuple[str, ...]) -> list[str]:
    return [name for name in names if any(name == target or name.endswith(f".{target}") for target in targets)]
