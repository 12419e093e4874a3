"""Loading: only what is needed, and a clear word about what does not work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from blocks.checkpoint_files import open_tensors
from blocks.errors import BadSpan, MissingTensors, UnknownModel, UnsupportedModel
from blocks.load import load_client, load_span, load_tokenizer
from blocks.source import INDEX_FILE, ModelSource, find_model
from blocks.spans import Span
from tests.unit.blocks.conftest import CPU, save_tiny


def shards_of(directory: Path, part: str) -> set[str]:
    """The shards that hold tensors whose key contains `part`."""
    weight_map = json.loads((directory / INDEX_FILE).read_text())["weight_map"]
    return {shard for key, shard in weight_map.items() if part in key}


def test_a_span_needs_no_shard_of_foreign_blocks_embedding_or_norms(tmp_path: Path) -> None:
    save_tiny("gpt2", tmp_path)
    source = find_model(str(tmp_path), cache_dir=tmp_path)
    needed = shards_of(tmp_path, ".h.2.") | shards_of(tmp_path, ".h.3.")
    removed = [file for file in tmp_path.glob("*.safetensors") if file.name not in needed]
    assert removed
    for file in removed:
        file.unlink()
    model = load_span(source, Span(2, 4), dtype=torch.float32, device=CPU)
    hidden_BTD = model.forward(torch.ones(1, 3, source.hidden_size), span=Span(2, 4))
    assert torch.isfinite(hidden_BTD).all()
    assert sum(name.startswith("transformer.h.2.") for name, _ in model.module.named_parameters()) > 0
    assert not any(name.startswith("transformer.h.1.") for name, _ in model.module.named_parameters())


def test_only_wanted_tensors_are_offered_to_be_read(llama_source: ModelSource) -> None:
    with open_tensors(llama_source, lambda key: ".layers.3." in key) as tensors:
        assert tensors
        assert all(".layers.3." in key for key in tensors)


def test_a_missing_shard_names_the_file(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    source = find_model(str(tmp_path), cache_dir=tmp_path)
    gone = sorted(shards_of(tmp_path, ".layers.4."))[0]
    (tmp_path / gone).unlink()
    with pytest.raises(MissingTensors, match=gone):
        load_span(source, Span(4, 5), dtype=torch.float32, device=CPU)


def test_a_checkpoint_without_a_blocks_tensor_is_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    lost = "model.layers.4.mlp.up_proj.weight"
    shard = index["weight_map"].pop(lost)
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / shard)
    tensors.pop(lost)
    save_file(tensors, tmp_path / shard, metadata={"format": "pt"})
    source = find_model(str(tmp_path), cache_dir=tmp_path)
    with pytest.raises(MissingTensors, match="up_proj"):
        load_span(source, Span(3, 5), dtype=torch.float32, device=CPU)


def test_a_damaged_shard_is_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    source = find_model(str(tmp_path), cache_dir=tmp_path)
    for shard in shards_of(tmp_path, ".layers.4."):
        (tmp_path / shard).write_bytes(b"not a safetensors file")
    with pytest.raises(MissingTensors, match="cannot be read"):
        load_span(source, Span(4, 5), dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a.layers.4.b": "../x"}}'])
def test_a_malformed_index_is_refused(tmp_path: Path, content: str) -> None:
    save_tiny("llama", tmp_path)
    source = find_model(str(tmp_path), cache_dir=tmp_path)
    (tmp_path / INDEX_FILE).write_text(content)
    with pytest.raises(MissingTensors, match="index"):
        load_span(source, Span(4, 5), dtype=torch.float32, device=CPU)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    source = find_model(str(tmp_path), cache_dir=tmp_path)
    with pytest.raises(MissingTensors, match=r"shape|fit"):
        load_span(source, Span(4, 5), dtype=torch.float32, device=CPU)


def test_blocks_past_the_end_are_refused(llama_source: ModelSource) -> None:
    with pytest.raises(BadSpan, match="6 blocks"):
        load_span(llama_source, Span(4, 7), dtype=torch.float32, device=CPU)


def test_a_part_that_is_not_held_is_refused(llama_source: ModelSource) -> None:
    model = load_span(llama_source, Span(2, 4), dtype=torch.float32, device=CPU)
    with pytest.raises(BadSpan, match="2:4"):
        model.forward(torch.zeros(1, 1, 64), span=Span(3, 5))


def test_the_span_and_the_client_are_frozen(llama_source: ModelSource) -> None:
    span = load_span(llama_source, Span(0, 1), dtype=torch.bfloat16, device=CPU)
    client = load_client(llama_source, dtype=torch.float32, device=CPU)
    assert span.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in span.module.parameters())
    assert not any(parameter.requires_grad for parameter in client.parameters())  # type: ignore[attr-defined]


def test_the_source_says_what_the_model_is(llama_source: ModelSource) -> None:
    assert (llama_source.num_blocks, llama_source.hidden_size, llama_source.vocab_size) == (6, 64, 99)
    assert llama_source.max_positions == 128
    assert llama_source.dtype == torch.float32


def test_the_fingerprint_ignores_where_and_with_what_a_config_was_saved(tmp_path: Path) -> None:
    one, other, bigger = tmp_path / "one", tmp_path / "other", tmp_path / "bigger"
    for directory in (one, other, bigger):
        save_tiny("llama", directory)
    config = json.loads((one / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"transformers_version": "9", "dtype": "bfloat16"}))
    (bigger / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    prints = [find_model(str(path), cache_dir=tmp_path).fingerprint for path in (one, other, bigger)]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    "name",
    ["/no/such/directory", "no such model", "missing.gguf", "package:no_such_package", "package:json", "a/b/c/d"],
)
def test_an_unknown_model_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnknownModel, match=name.removeprefix("package:")):
        find_model(name, cache_dir=tmp_path)


def test_a_hub_model_that_is_not_cached_says_so_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UnknownModel, match="nobody/nothing"):
        find_model("nobody/nothing", cache_dir=tmp_path)


def test_a_directory_without_config_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match=r"config\.json"):
        find_model(str(tmp_path), cache_dir=tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": "of_another_world"}'])
def test_a_config_that_cannot_be_read_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UnsupportedModel):
        find_model(str(tmp_path), cache_dir=tmp_path)


def test_a_checkpoint_that_is_not_safetensors_is_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    for file in tmp_path.glob("model*"):
        file.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    source = find_model(str(tmp_path), cache_dir=tmp_path)
    with pytest.raises(UnsupportedModel, match="safetensors"):
        load_span(source, Span(0, 1), dtype=torch.float32, device=CPU)


def test_a_model_without_tokenizer_says_so(llama_source: ModelSource) -> None:
    with pytest.raises(UnknownModel, match="tokenizer"):
        load_tokenizer(llama_source)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("mamba", "recurrent"),
        ("jamba", "recurrent"),
        ("qwen3_next", "recurrent"),
        ("rwkv", "recurrent"),
        ("falcon_h1", "recurrent"),
        ("gemma3n_text", "between layers"),
        ("gemma3n", "between layers"),
        ("gemma4_text", "between layers"),
        ("t5", "encoder-decoder"),
        ("bart", "encoder-decoder"),
        ("bert", "encoder"),
        ("vit", "not a text decoder"),
        ("clip", "not a text decoder"),
    ],
)
def test_an_architecture_that_cannot_be_cut_is_refused_with_the_reason(
    tmp_path: Path, family: str, reason: str
) -> None:
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=reason):
        find_model(str(tmp_path), cache_dir=tmp_path)
