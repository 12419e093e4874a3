"""The run's units in a peft model that somebody else made: found, or refused in one line that names both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from blocks.adapters import LoraSettings, all_unit_shapes
from blocks.errors import BadAdapter
from blocks.peft_units import check_base, find_units
from blocks.source import ModelSource, find_model
from blocks.spans import UnitId
from tests.errors_page import met

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft about transformers

LORA = LoraSettings(rank=4, alpha=8.0, targets=("q_proj", "v_proj"), seed=3)


def save_llama(directory: Path, seed: int, **sizes: int) -> ModelSource:
    torch.manual_seed(seed)
    given = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3} | sizes
    AutoModelForCausalLM.from_config(LlamaConfig(num_attention_heads=2, **given)).save_pretrained(directory)
    return find_model(str(directory), cache_dir=directory)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return save_llama(tmp_path_factory.mktemp("llama"), 1)


def peft_of(source: ModelSource, dtype: torch.dtype = torch.float32, **changes: object) -> nn.Module:
    given: dict[str, object] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | changes
    return get_peft_model(AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype), LoraConfig(**given))


def test_units_are_the_models_own_parameters_under_the_runs_names(source: ModelSource) -> None:
    model = peft_of(source)
    units = find_units(model, LORA, source)
    assert {unit: {n: tuple(p.shape) for n, p in named.items()} for unit, named in units.items()} == all_unit_shapes(
        LORA, source
    )
    own = model.get_submodule("base_model.model.model.layers.1.self_attn.v_proj").lora_B["default"].weight
    assert units[UnitId("default/block.1")]["self_attn.v_proj.lora_B"] is own


def test_a_model_inside_somebodys_own_module_has_the_same_units(source: ModelSource) -> None:
    class Mine(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.inner = model

    model = peft_of(source)
    assert find_units(Mine(model), LORA, source).keys() == find_units(model, LORA, source).keys()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 8, "lora_alpha": 16}, r"rank 8, the run's has 4; use r=4"),
        ({"lora_alpha": 16}, r"scaled by 4, the run's by 2; use lora_alpha=8"),
        ({"use_rslora": True}, "use_rslora"),
        ({"use_dora": True}, "DoRA"),
        ({"target_modules": ["q_proj"]}, r"the run has a LoRA on self_attn.v_proj of layer 0 and this model has none"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "this model has a LoRA on self_attn.o_proj"),
        ({"target_modules": ["q_proj", "v_proj", "lm_head"]}, "lm_head is outside the layers"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.* is trained here and no part of the run"),
        ({"layers_to_transform": [0, 2]}, "layer block.1|of layer 1"),
    ],
)
def test_another_adapter_is_refused_in_one_line(source: ModelSource, changes: dict[str, object], words: str) -> None:
    with pytest.raises(BadAdapter, match=words) as refused:
        find_units(peft_of(source, **changes), LORA, source)
    assert "\n" not in str(refused.value)


def test_what_is_commonly_set_otherwise_is_on_the_page_of_errors(source: ModelSource) -> None:
    refused = {}
    for changes in ({"r": 8, "lora_alpha": 16}, {"lora_alpha": 16}, {"use_dora": True}):
        with pytest.raises(BadAdapter) as caught:
            find_units(peft_of(source, **changes), LORA, source)
        refused[next(iter(changes))] = caught.value
    met("has rank …, the run's has", refused["r"])
    met("is scaled by …, the run's by", refused["lora_alpha"])
    met("is DoRA", refused["use_dora"])


def test_a_model_without_lora_or_with_two_is_refused(source: ModelSource) -> None:
    plain = AutoModelForCausalLM.from_pretrained(source.path)
    with pytest.raises(BadAdapter) as refused:
        find_units(plain, LORA, source)
    met("the model has no LoRA", refused.value)
    model = peft_of(source)
    model.add_adapter("second", LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(BadAdapter) as refused:
        find_units(model, LORA, source)
    met("several adapters are active", refused.value)


@pytest.mark.parametrize(("sizes", "words"), [({"num_hidden_layers": 4}, "layer 3"), ({"hidden_size": 64}, "is .*64")])
def test_another_shape_of_model_is_refused(
    source: ModelSource, tmp_path: Path, sizes: dict[str, int], words: str
) -> None:
    with pytest.raises(BadAdapter, match=words):
        find_units(peft_of(save_llama(tmp_path, 1, **sizes)), LORA, source)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_runs_weights_pass_in_any_dtype(source: ModelSource, dtype: torch.dtype) -> None:
    check_base(peft_of(source, dtype), source)


def test_other_weights_of_the_same_shape_are_refused(source: ModelSource, tmp_path: Path) -> None:
    other = save_llama(tmp_path, 2)
    with pytest.raises(BadAdapter, match=f"has other values than the run's model {source.name}"):
        check_base(peft_of(other), source)
