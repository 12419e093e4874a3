"""The run's units inside a peft model that somebody else loaded and trains: found by name, and checked to be the run's.

Only LoRA on the decoder's layers is shared, so anything else that such a model would train is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import cast

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from blocks.adapters import LoraSettings, all_unit_shapes
from blocks.checkpoint_files import layer_number, open_tensors
from blocks.errors import BadAdapter, MissingTensors, UnsupportedModel
from blocks.part import layers_name_of
from blocks.source import ModelSource, read_config
from blocks.spans import UnitId, unit_of

_KINDS = ("lora_A", "lora_B")
_SAMPLED = 3  # tensors of a layer that are compared with the run's
_VALUES = 64  # of the first row of each
_TOLERANCE = 2e-2  # of bf16 and fp16, generously: another model's weights differ in nearly every value


def find_units(model: nn.Module, settings: LoraSettings, source: ModelSource) -> dict[UnitId, dict[str, nn.Parameter]]:
    """The trained LoRA parameters of `model`, by unit and by name in the block, sorted.

    Raises:
        BadAdapter: the model has no LoRA that is trained, or another one than the run's; the message names both.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    adapter = _trained_adapter(layers)
    shapes = all_unit_shapes(settings, source)
    layers_name = layers_name_of(read_config(source))
    found: dict[UnitId, dict[str, nn.Parameter]] = {}
    for name, layer in layers:
        if adapter not in layer.lora_A:
            continue
        block, module = _place(name, layers_name)
        _check_layer(layer, adapter, name, settings)
        named = found.setdefault(unit_of(settings.name, block), {})
        for kind in _KINDS:
            named[f"{module}.{kind}"] = cast(nn.Parameter, getattr(layer, kind)[adapter].weight)
    _check_shapes(found, shapes, source)
    _check_others(model, found)
    return {unit: dict(sorted(found[unit].items())) for unit in shapes}


def check_base(model: nn.Module, source: ModelSource) -> None:
    """Refuse a base model whose weights are not the run's: a few values of its first, middle and last layer.

    Weights that are quantized here, or named in another way than on disk, are not compared, nor is anything where the
    run's weights are not on this machine.

    Raises:
        BadAdapter: a value is another one; the message names the tensor and the run's model.
    """
    layers_name = layers_name_of(read_config(source))
    here = {_in_layers(name, layers_name): tensor for name, tensor in model.named_parameters()}
    on_disk = replace(source, hub_id=None)  # nothing is fetched for this
    for block in sorted({0, source.num_blocks // 2, source.num_blocks - 1}):
        try:
            odd = _first_difference(here, on_disk, layers_name, block)
        except (MissingTensors, UnsupportedModel):
            return
        if odd:
            raise BadAdapter(f"{odd} of this model has other values than the run's model {source.name}; load that one")


def _trained_adapter(layers: list[tuple[str, LoraLayer]]) -> str:
    names = sorted({str(name) for _, layer in layers for name in layer.active_adapters})
    if not names:
        raise BadAdapter("the model has no LoRA; make one with peft.get_peft_model(model, LoraConfig(...)) first")
    if len(names) > 1:
        raise BadAdapter(f"several adapters are active ({', '.join(names)}); activate the one to share, set_adapter()")
    return names[0]


def _place(name: str, layers_name: str) -> tuple[int, str]:
    """The block and the name inside it of a module of a peft model."""
    number, _, module = _in_layers(name, layers_name).partition(".")
    if not module:
        raise BadAdapter(
            f"the LoRA on {name} is outside the layers {layers_name}, which alone a run shares; leave it out"
        )
    return int(number), module


def _check_layer(layer: LoraLayer, adapter: str, name: str, settings: LoraSettings) -> None:
    rank = int(layer.r[adapter])
    if rank != settings.rank:
        raise BadAdapter(f"the LoRA on {name} has rank {rank}, the run's has {settings.rank}; use r={settings.rank}")
    scale = float(layer.scaling[adapter])
    if abs(scale - settings.scaling) > 1e-6 * settings.scaling:
        raise BadAdapter(
            f"the LoRA on {name} is scaled by {scale:g}, the run's by {settings.scaling:g}; "
            f"use lora_alpha={settings.alpha:g} without use_rslora"
        )
    if len(getattr(layer, "lora_magnitude_vector", ())):
        raise BadAdapter(f"the LoRA on {name} is DoRA, the run's is not; leave use_dora out")


def _check_shapes(
    found: Mapping[UnitId, Mapping[str, nn.Parameter]],
    shapes: Mapping[UnitId, Mapping[str, tuple[int, ...]]],
    source: ModelSource,
) -> None:
    wanted = {(unit, name): shape for unit, named in shapes.items() for name, shape in named.items()}
    here = {(unit, name): tuple(p.shape) for unit, named in found.items() for name, p in named.items()}
    for unit, name in sorted(wanted.keys() ^ here.keys()):
        side, other = ("the run", "this model") if (unit, name) in wanted else ("this model", "the run")
        targets = sorted({each.split(".")[-2] for named in shapes.values() for each in named})
        raise BadAdapter(
            f"{side} has a LoRA on {name.rpartition('.')[0]} of layer {unit.rpartition('.')[2]} and {other} has none; "
            f"use target_modules={targets} on {source.name}"
        )
    for (unit, name), shape in wanted.items():
        if here[unit, name] != shape:
            raise BadAdapter(
                f"{name} of layer {unit.rpartition('.')[2]} is {here[unit, name]} here and {shape} in the run; "
                f"load the run's model {source.name}"
            )


def _check_others(model: nn.Module, found: Mapping[UnitId, Mapping[str, nn.Parameter]]) -> None:
    shared = {id(parameter) for named in found.values() for parameter in named.values()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in shared:
            raise BadAdapter(f"{name} is trained here and no part of the run; leave out modules_to_save and bias")


def _in_layers(name: str, layers_name: str) -> str:
    """A parameter's name from its layer's number on, as a checkpoint has it; empty outside the layers."""
    found = re.search(rf"(?:^|\.){re.escape(layers_name.rpartition('.')[2])}\.(\d+\..+)", name)
    return "" if found is None else found[1].replace(".base_layer.", ".")


def _first_difference(
    here: Mapping[str, torch.Tensor], source: ModelSource, layers_name: str, block: int
) -> str | None:
    with open_tensors(source, lambda key: layer_number(key, layers_name) == block) as tensors:
        for key in _spread(sorted(tensors)):
            own = here.get(_in_layers(key, layers_name))
            run = torch.as_tensor(cast(torch.Tensor, tensors[key][:1])).flatten()[:_VALUES].float()
            if own is None or not own.is_floating_point() or own.is_meta:
                continue
            values = own.detach()[:1].flatten()[:_VALUES].to("cpu", torch.float32)
            if values.shape == run.shape and not torch.allclose(values, run, rtol=_TOLERANCE, atol=1e-4):
                return key
    return None


def _spread(names: list[str]) -> Iterator[str]:
    return iter(names[:: max(1, len(names) // _SAMPLED)][:_SAMPLED])
