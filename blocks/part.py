"""Build a family's own class cut to a part and fill it with just that part's tensors. What the part is, others say."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from transformers import PretrainedConfig

from blocks.checkpoint_files import open_tensors
from blocks.errors import MissingTensors
from blocks.lean import register_meta_kernels
from blocks.loading import loading
from blocks.skip import find_layers
from blocks.source import ModelSource, family_class, read_config, text_config


def whole_on_meta(config: PretrainedConfig) -> nn.Module:
    """The uncut model without memory for its weights, to look at names and shapes."""
    try:
        return _on_meta(config)
    except NotImplementedError:  # some families compute as they are made, with kernels that a lean import leaves out
        if not register_meta_kernels():
            raise
        return _on_meta(config)


def _on_meta(config: PretrainedConfig) -> nn.Module:
    with torch.device("meta"):
        return family_class(config)(copy.deepcopy(config))


def layers_name_of(config: PretrainedConfig) -> str:
    """The path of the list of layers, such as `model.layers`."""
    return find_layers(whole_on_meta(config), int(text_config(config).num_hidden_layers))[0]


def block_parameters(source: ModelSource) -> int:
    """How many parameters the largest block of a model has, counted without memory for them."""
    config = read_config(source)
    _, layers = find_layers(whole_on_meta(config), source.num_blocks)
    return max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)


def load_part(
    source: ModelSource,
    config: PretrainedConfig,
    edit: Callable[[nn.Module], None],
    wanted: Callable[[str], bool],
    placement: tuple[torch.dtype, torch.device],
    mixin: type = object,
) -> tuple[nn.Module, set[str]]:
    """The family's class, cut by `edit` before anything is allocated, with the `wanted` keys of the checkpoint.

    transformers does the reading, so that fused experts, renamed keys and quantized checkpoints work as they do there.
    `mixin` adds methods to the class. Returns the frozen module in eval mode and the names that no key filled.

    Raises:
        MissingTensors: a tensor that is needed is not there or has another shape.
    """
    dtype, device = placement
    family = family_class(config)

    def initialise(self: nn.Module, given: PretrainedConfig, *args: object, **kwargs: object) -> None:
        family.__init__(self, given, *args, **kwargs)
        edit(self)

    body = {
        "__init__": initialise,
        "__module__": family.__module__,
        "__qualname__": family.__qualname__,
        "_keys_to_ignore_on_load_unexpected": [r".*"],
    }
    bases = (family,) if mixin is object else (mixin, family)
    part = type(family.__name__, bases, body)
    with open_tensors(source, wanted, dtype) as tensors, loading():
        try:
            module, info = part.from_pretrained(  # type: ignore[attr-defined]
                None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
            )
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise MissingTensors(
                f"the weights of {source.name} do not fit its config ({reason}); fetch the model again"
            ) from error
    if info["mismatched_keys"]:
        name = next(iter(info["mismatched_keys"]))[0]
        raise MissingTensors(f"{source.name} has {name} in a shape that its config does not; fetch the model again")
    module = cast(nn.Module, module).to(device).requires_grad_(False).eval()
    return module, set(info["missing_keys"])
