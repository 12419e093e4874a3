"""Write the whole adapter as a directory that peft loads on the whole model."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from blocks.adapters import LoraSettings, UnitTensors, all_unit_shapes, block_of, check_unit
from blocks.errors import BadAdapter
from blocks.part import whole_on_meta
from blocks.skip import find_layers
from blocks.source import ModelSource, read_config
from blocks.spans import UnitId
from blocks.targets import uses_conv1d

FILES = frozenset({"adapter_model.safetensors", "adapter_config.json", "README.md", "validation.json"})
"""What an export may hold; validation.json is beside the best one (swarm.training.best_adapter)."""


def export_adapter(
    units: Mapping[UnitId, UnitTensors], settings: LoraSettings, source: ModelSource, directory: Path
) -> None:
    """Write `adapter_model.safetensors`, `adapter_config.json` and a README; the directory appears whole or not at all.

    An adapter that is there already is replaced.

    Raises:
        BadAdapter: units are missing, unknown or malformed, or the directory holds something else or is not writable.
    """
    shapes = all_unit_shapes(settings, source)
    if set(units) != set(shapes):
        odd = sorted(set(units) ^ set(shapes))
        raise BadAdapter(f"{len(odd)} units are missing or unknown, such as {odd[0]}; export needs each unit once")
    for unit, tensors in units.items():
        check_unit(unit, tensors, shapes[unit])
    check_place(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".exporting-", dir=directory.parent))
        try:
            _write(units, settings, source, work)
            _swap_in(work, directory)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise BadAdapter(
            f"cannot write the adapter to {directory} ({error.strerror}); free space or name another directory"
        ) from error


def check_place(directory: Path) -> None:
    """Refuse a directory for an export where anything but an older export would be replaced.

    Raises:
        BadAdapter: it holds other files, or is none.
    """
    try:
        names = sorted(each.name for each in directory.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise BadAdapter(f"{directory} cannot take an adapter ({error.strerror}); name another directory") from None
    if names and "adapter_config.json" not in names:
        raise BadAdapter(f"{directory} is not empty and holds no adapter; name another directory")
    others = [name for name in names if name not in FILES]
    if others:
        raise BadAdapter(f"{directory} holds more than an adapter, such as {others[0]:.80}; name another directory")


def _write(units: Mapping[UnitId, UnitTensors], settings: LoraSettings, source: ModelSource, directory: Path) -> None:
    whole = whole_on_meta(read_config(source))
    layers_name, layers = find_layers(whole, source.num_blocks)
    tensors: dict[str, Tensor] = {}
    modules: set[str] = set()
    for unit, named in units.items():
        for name, tensor in named.items():
            module, _, kind = name.rpartition(".")
            full = f"{layers_name}.{block_of(unit)}.{module}"
            modules.add(full)
            tensors[f"base_model.model.{full}.{kind}.weight"] = tensor.detach().to("cpu", torch.float32).contiguous()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=_short_names(whole, modules),
        fan_in_fan_out=uses_conv1d(layers[0]),
        task_type="CAUSAL_LM",
        base_model_name_or_path=source.name,
        inference_mode=True,
    ).save_pretrained(directory)
    (directory / "README.md").write_text(
        f"---\nbase_model: {source.name}\nlibrary_name: peft\n---\n"
        f"LoRA `{settings.name}` (rank {settings.rank}) for `{source.name}`, trained with swarmtune.\n"
        "Load it with `PeftModel.from_pretrained(base_model, THIS_DIRECTORY)`.\n"
    )


def _short_names(whole: nn.Module, modules: set[str]) -> list[str]:
    """`q_proj` and the like where they name these modules and no others, which more tools can read; else full names."""
    leaves = {module.rpartition(".")[2] for module in modules}
    named = {name for name, _ in whole.named_modules() if name.rpartition(".")[2] in leaves}
    return sorted(leaves if named == modules else modules)


def _swap_in(work: Path, directory: Path) -> None:
    """Rename `work` to `directory`; what was there goes away only after it."""
    work.chmod(0o755)
    if not directory.exists():
        os.rename(work, directory)
        return
    old = Path(tempfile.mkdtemp(prefix=".replaced-", dir=directory.parent))
    os.rename(directory, old / "adapter")
    os.rename(work, directory)
    shutil.rmtree(old, ignore_errors=True)
