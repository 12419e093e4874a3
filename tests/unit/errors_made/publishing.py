"""How to meet the errors of publishing adapters. Each gets an empty directory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from blocks.adapters import LoraSettings
from blocks.peft_directory import read_peft_directory
from peers.published.catalogue import Catalogue
from swarm.adapters.finding import unknown_adapter
from swarm.adapters.publishing import check_new_name, own_run
from swarm.join_string import parse_join
from tests.unit.errors_made.entering import LINE, SPEC, file_in
from tests.unit.errors_made.models import TINY, found, source

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
LORA = LoraSettings(seed=1, rank=4, targets=("q_proj",))
GOOD = {KEY.format("A"): torch.ones(2, 8), KEY.format("B"): torch.ones(8, 2)}


def adapter_in(
    path: Path, tensors: Mapping[str, torch.Tensor] = GOOD, *, config: object = None, **changes: object
) -> Path:
    """An adapter's directory, with something wrong in it."""
    directory = path / "adapter"
    directory.mkdir()
    file_in(directory / "adapter_config.json", json.dumps({**CONFIG, **changes} if config is None else config))
    save_file(dict(tensors), directory / "adapter_model.safetensors")
    return directory


def read(path: Path, tensors: Mapping[str, torch.Tensor] = GOOD, **changes: object) -> object:
    model = path / "model"
    model.mkdir()
    llama = found(model, "llama", num_hidden_layers=2, **TINY)
    return read_peft_directory(adapter_in(path, tensors, **changes), LORA, llama)


def without(path: Path) -> object:
    return read_peft_directory(path / "nothing", LoraSettings(seed=1), source(path))


def many(number: int) -> dict[str, torch.Tensor]:
    return {f"{number}": torch.zeros(1) for number in range(number)}


def refuse_unknown(path: Path) -> None:
    raise unknown_adapter("cook", Catalogue(run="tales"))


MADE: dict[str, Callable[[Path], object]] = {
    "can publish adapters": lambda path: own_run(parse_join(LINE)),
    "cannot name a published adapter": lambda path: check_new_name("Pirate", SPEC),
    "which are asked by it": lambda path: check_new_name(SPEC.name, SPEC),
    "no published adapter": refuse_unknown,
    "cannot be read (…); give a directory that": without,
    "is no table of settings": lambda path: read(path, config=[1]),
    "only LoRA can be published": lambda path: read(path, peft_type="IA3"),
    "only a LoRA without it": lambda path: read(path, use_dora=True),
    "which changes the base model": lambda path: read(path, init_lora_weights="pissa_niter_4"),
    "it must be 1 to": lambda path: read(path, r=True),
    "it must be positive": lambda path: read(path, lora_alpha=-1.0),
    "train it again with a smaller rank": lambda path: read(path, r=8),
    "and the run has none there": lambda path: read(path, {KEY.replace("q_", "k_").format("A"): torch.ones(2, 8)}),
    "the adapter is for another model": lambda path: read(path, {KEY.format("A"): torch.ones(2, 16)}),
    "is empty: every B is zero": lambda path: read(path, {KEY.format("A"): torch.ones(2, 8)}),
    "leave such modules out": lambda path: read(path, {"base_model.model.lm_head.lora_A.weight": torch.ones(2, 8)}),
    "which is no factor of rank": lambda path: read(path, {KEY.format("A"): torch.ones(3, 8)}),
    "save one alone": lambda path: read(path, {**GOOD, KEY.format("A.other"): torch.ones(2, 8)}),
    "tensors; at most … are read": lambda path: read(path, many((1 << 17) + 1)),
}
