"""A finished adapter, read from a directory as peft writes it: data only, bounded, and checked against the run's LoRA.

It is brought to the run's form: missing rows of a smaller rank and modules that it leaves out are zero, which adds
nothing, and its scale is folded into B. B and A: the two factors of the LoRA (Hu et al. 2021).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from blocks.adapters import MAX_RANK, LoraSettings, UnitTensors, all_unit_shapes, check_unit
from blocks.errors import BadAdapter
from blocks.part import layers_name_of
from blocks.source import ModelSource, read_config
from blocks.spans import UnitId, unit_of

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"

_MAX_CONFIG_BYTES = 1 << 20
_MAX_TENSORS = 1 << 17
_MOST_ALPHA = 1e9
_PLAIN: Mapping[str, object] = {
    "use_dora": False,
    "use_qalora": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "lora_bias": False,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "use_bdlora": None,
    "arrow_config": None,
    "velora_config": None,
    "kasa_config": None,
    "monteclora_config": None,
}
"""What a LoRA of this form has, or leaves out; anything else would change its values without being in A and B."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to begin which replace base weights, too


@dataclass(frozen=True, slots=True)
class _Config:
    rank: int
    scaling: float


def read_peft_directory(directory: Path, settings: LoraSettings, source: ModelSource) -> dict[UnitId, UnitTensors]:
    """The units of the adapter in `directory`, fp32, in the form of the run's LoRA on the model `source`.

    Raises:
        BadAdapter: it cannot be read, is no plain LoRA, has a larger rank than the run's, or is for another model.
    """
    config, shapes = _read_config(directory / CONFIG_FILE), all_unit_shapes(settings, source)
    if config.rank > settings.rank:
        raise BadAdapter(
            f"the adapter in {directory} has rank {config.rank}, the run's is {settings.rank}; publish it in a run "
            f"with adapter.lora_rank = {config.rank}, or train it again with a smaller rank"
        )
    units: dict[UnitId, UnitTensors] = {
        unit: {name: torch.zeros(shape) for name, shape in named.items()} for unit, named in shapes.items()
    }
    layers_name = layers_name_of(read_config(source))
    for (unit, name), tensor in _read_tensors(directory, settings.name, config.rank, layers_name).items():
        if name not in units.get(unit, {}):
            targets = sorted({each.split(".")[-2] for named in shapes.values() for each in named})
            raise BadAdapter(
                f"the adapter in {directory} has a LoRA on {name.rpartition('.')[0]:.80} of block "
                f"{unit.rpartition('.')[2]}, and the run has none there: it is for another model, or has more than the "
                f"run's target modules ({', '.join(targets)})"
            )
        whole = units[unit][name]
        part = whole[: config.rank] if name.endswith("lora_A") else whole[:, : config.rank]
        if part.shape != tensor.shape:
            raise BadAdapter(
                f"{name:.80} of block {unit.rpartition('.')[2]} is {tuple(tensor.shape)} in {directory} and "
                f"{tuple(part.shape)} in the run's model; the adapter is for another model"
            )
        part.copy_(tensor if name.endswith("lora_A") else tensor.float() * (config.scaling / settings.scaling))
    for unit, tensors in units.items():
        check_unit(unit, tensors, shapes[unit])
    if not any(bool(tensor.any()) for tensors in units.values() for name, tensor in tensors.items() if _is_b(name)):
        raise BadAdapter(f"the adapter in {directory} is empty: every B is zero, so texts would be the base model's")
    return units


def base_of(directory: Path) -> str:
    """The base model that an adapter says it is for, in its trainer's words; empty where it says nothing.

    Raises:
        BadAdapter: its settings cannot be read.
    """
    name = _json(directory / CONFIG_FILE).get("base_model_name_or_path")
    return name if isinstance(name, str) else ""


def _read_config(path: Path) -> _Config:
    found = _json(path)
    if found.get("peft_type") != "LORA":
        raise BadAdapter(f"{path} is of a {found.get('peft_type')!s:.40} adapter; only LoRA can be published")
    for name, plain in _PLAIN.items():
        if found.get(name, plain) not in (plain, None):
            raise BadAdapter(f"{path} has {name} = {found[name]!r:.80}; only a LoRA without it can be published")
    begun = str(found.get("init_lora_weights", True)).lower()
    if begun.startswith(_CHANGES_BASE):
        raise BadAdapter(
            f"{path} has init_lora_weights = {begun:.40}, which changes the base model; save it converted to plain LoRA"
        )
    rank, alpha = found.get("r"), found.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise BadAdapter(f"{path} has r = {rank!r:.80}; it must be 1 to {MAX_RANK}")
    if type(alpha) not in (int, float) or not 0 < alpha <= _MOST_ALPHA:  # type: ignore[operator]
        raise BadAdapter(f"{path} has lora_alpha = {alpha!r:.80}; it must be positive, and at most {_MOST_ALPHA:g}")
    rows = math.sqrt(rank) if found.get("use_rslora") else rank
    return _Config(rank=rank, scaling=float(alpha) / rows)  # type: ignore[arg-type]


def _json(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_CONFIG_BYTES + 1)
        found = json.loads(raw) if len(raw) <= _MAX_CONFIG_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise BadAdapter(f"{path} cannot be read ({error}); give a directory that `swarm export` wrote") from None
    if not isinstance(found, dict):
        raise BadAdapter(f"{path} is no table of settings; give a directory that `swarm export` wrote")
    return found


def _read_tensors(directory: Path, adapter: str, rank: int, layers_name: str) -> dict[tuple[UnitId, str], Tensor]:
    path = directory / TENSORS_FILE
    in_block = re.compile(
        rf"(?:base_model\.model\.)?{re.escape(layers_name)}\.(\d{{1,4}})\.([A-Za-z0-9_.]{{1,200}})\.(lora_A|lora_B)(?:\.\w{{1,64}})?\.weight"
    )
    found: dict[tuple[UnitId, str], Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            if len(keys) > _MAX_TENSORS:
                raise BadAdapter(f"{path} has {len(keys)} tensors; at most {_MAX_TENSORS} are read")
            for key in keys:
                match = in_block.fullmatch(key)
                if match is None:
                    raise BadAdapter(
                        f"{path} has {key!r:.120}, which is no LoRA of a block in {layers_name}; leave such modules out"
                    )
                shape = file.get_slice(key).get_shape()
                if len(shape) != 2 or rank not in shape:  # before it is read
                    raise BadAdapter(f"{path} has {key!r:.120} of shape {shape}, which is no factor of rank {rank}")
                unit, name = unit_of(adapter, int(match[1])), f"{match[2]}.{match[3]}"
                if (unit, name) in found:
                    raise BadAdapter(f"{path} has several LoRAs on {match[2]:.80} of block {match[1]}; save one alone")
                found[unit, name] = file.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise BadAdapter(f"{path} cannot be read ({error}); give a directory that `swarm export` wrote") from None
    return found


def _is_b(name: str) -> bool:
    return name.endswith("lora_B")
