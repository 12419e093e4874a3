"""A finished adapter from peft's files is, in the run's form, the same function: rank, scale and modules included."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from blocks.adapters import LoraSettings, add_version, all_unit_shapes, attach, use_version
from blocks.errors import BadAdapter
from blocks.load import load_span
from blocks.peft_directory import TENSORS_FILE, base_of, read_peft_directory
from blocks.source import ModelSource
from blocks.spans import Span
from tests.unit.blocks.conftest import CPU, Cluster, make_cluster

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

RUN = LoraSettings(seed=3, rank=8, alpha=32.0, targets=("q_proj", "v_proj"))
HIDDEN_BTD = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return make_cluster("llama", tmp_path_factory.mktemp("llama"))


def save(cluster: Cluster, directory: Path, **options: object) -> PeftModel:
    """A random adapter, saved by peft; returns the model with it."""
    given = {"r": 4, "lora_alpha": 6.0, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    whole = type(cluster.whole).from_pretrained(cluster.source.path, dtype=torch.float32)
    model = get_peft_model(whole, LoraConfig(**given))
    dice = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=dice) * 0.3)
    model.save_pretrained(directory)
    return model.eval()


def output_here(source: ModelSource, directory: Path) -> torch.Tensor:
    """What the blocks put out with a version that is made of the directory."""
    model = load_span(source, Span(0, 6), dtype=torch.float32, device=CPU)
    attach(model, RUN)
    add_version(model, "published", read_peft_directory(directory, RUN, source))
    use_version(model, "published")
    with torch.no_grad():
        return model.forward(HIDDEN_BTD, span=Span(0, 6), mask_BT=None)


def output_of(model: PeftModel) -> torch.Tensor:
    """The same from the whole model, before its last norm."""
    inner = model.get_base_model().model
    inner.norm = torch.nn.Identity()
    with torch.no_grad():
        return inner(inputs_embeds=HIDDEN_BTD, use_cache=False).last_hidden_state


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"r": 8, "lora_alpha": 32.0},
        {"r": 1, "lora_alpha": 1.0},
        {"use_rslora": True},
        {"target_modules": ["v_proj"]},
        {"layers_to_transform": [1, 4]},
    ],
    ids=["smaller", "the same rank", "rank 1", "rslora", "fewer modules", "fewer blocks"],
)
def test_blocks_compute_with_it_what_peft_computes(
    cluster: Cluster, tmp_path: Path, options: dict[str, object]
) -> None:
    expected = output_of(save(cluster, tmp_path / "adapter", **options))
    output = output_here(cluster.source, tmp_path / "adapter")
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    plain = cluster.whole.model(inputs_embeds=HIDDEN_BTD, use_cache=False).last_hidden_state
    assert not torch.allclose(output, plain, atol=1e-2), "the adapter changes nothing, so nothing was shown"


def test_units_have_the_runs_shapes_and_a_smaller_rank_is_filled_with_zeros(cluster: Cluster, tmp_path: Path) -> None:
    save(cluster, tmp_path / "adapter")
    units = read_peft_directory(tmp_path / "adapter", RUN, cluster.source)
    shapes = all_unit_shapes(RUN, cluster.source)
    assert {unit: {name: tuple(t.shape) for name, t in named.items()} for unit, named in units.items()} == shapes
    some = next(iter(units.values()))
    assert not some["self_attn.q_proj.lora_A"][4:].any()
    assert not some["self_attn.q_proj.lora_B"][:, 4:].any()
    assert some["self_attn.q_proj.lora_B"][:, :4].any()


def test_half_precision_is_read_and_what_is_not_finite_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    save(cluster, tmp_path / "adapter")
    path = tmp_path / "adapter" / TENSORS_FILE
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    units = read_peft_directory(tmp_path / "adapter", RUN, cluster.source)
    assert {tensor.dtype for named in units.values() for tensor in named.values()} == {torch.float32}
    next(iter(tensors.values()))[0, 0] = math.nan
    save_file(tensors, path)
    with pytest.raises(BadAdapter, match="not finite"):
        read_peft_directory(tmp_path / "adapter", RUN, cluster.source)


def test_pickled_weights_are_not_opened(cluster: Cluster, tmp_path: Path) -> None:
    save(cluster, tmp_path / "adapter")
    path = tmp_path / "adapter" / TENSORS_FILE
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    with pytest.raises(BadAdapter, match="cannot be read"):
        read_peft_directory(tmp_path / "adapter", RUN, cluster.source)


def test_a_file_that_is_cut_off_or_too_long_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    save(cluster, tmp_path / "adapter")
    path = tmp_path / "adapter" / TENSORS_FILE
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(BadAdapter, match="cannot be read"):
        read_peft_directory(tmp_path / "adapter", RUN, cluster.source)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(" " * (1 << 21) + config.read_text())
    with pytest.raises(BadAdapter, match="no table"):
        read_peft_directory(tmp_path / "adapter", RUN, cluster.source)


def test_the_base_model_is_what_its_trainer_wrote(tmp_path: Path) -> None:
    for written, read in (({"base_model_name_or_path": "a/b"}, "a/b"), ({}, ""), ({"base_model_name_or_path": 5}, "")):
        (tmp_path / "adapter_config.json").write_text(json.dumps(written))
        assert base_of(tmp_path) == read
