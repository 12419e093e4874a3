"""Which tensors of a checkpoint a part of the model needs, and lazy access to just those. Opens only their shards."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol, cast

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open

from blocks.errors import MissingTensors, UnsupportedModel
from blocks.gguf import BF16_FILE
from blocks.source import INDEX_FILE, SINGLE_FILE, ModelSource

MAX_INDEX_BYTES = 64 << 20


class LazyTensor(Protocol):
    """A tensor in a file; its bytes are read when it is sliced."""

    def __getitem__(self, index: object) -> object: ...


def layer_number(key: str, layers_name: str) -> int | None:
    """The number of the layer that a checkpoint key belongs to, or None for the embedding, norms and head.

    Only the last part of the list's name is compared, as older checkpoints lack the prefixes of newer classes.
    """
    attribute = re.escape(layers_name.rpartition(".")[2])
    match = re.search(rf"(?:^|\.){attribute}\.(\d+)\.", key)
    return None if match is None else int(match[1])


@contextmanager
def open_tensors(
    source: ModelSource, wanted: Callable[[str], bool], dtype: torch.dtype | None = None
) -> Iterator[dict[str, LazyTensor]]:
    """The checkpoint's tensors whose key is `wanted`, not read yet. Shards without any are neither opened nor fetched.

    Files are mapped, not copied: tensors that are used in the dtype of the file share their memory with every process
    that does the same. `dtype` prefers a copy of the file in that dtype where there is one.

    Raises:
        MissingTensors: a shard that is needed is not on disk and cannot be fetched, or is damaged.
        UnsupportedModel: the checkpoint is not in safetensors.
    """
    with ExitStack() as stack:
        tensors: dict[str, LazyTensor] = {}
        for shard in _shards(source, wanted, dtype):
            try:
                opened = stack.enter_context(safe_open(_shard_path(source, shard), framework="pt", device="cpu"))
            except (SafetensorError, OSError) as error:
                raise MissingTensors(
                    f"{source.path / shard} cannot be read ({error}); fetch the model again"
                ) from error
            for key in opened.keys():  # noqa: SIM118  (not a dict)
                if wanted(key):
                    tensors[key] = cast(LazyTensor, opened.get_slice(key))
        yield tensors


def _shards(source: ModelSource, wanted: Callable[[str], bool], dtype: torch.dtype | None) -> list[str]:
    if dtype == torch.bfloat16 and (source.path / BF16_FILE).is_file():
        return [BF16_FILE]
    index = source.path / INDEX_FILE
    if not index.is_file():
        if source.hub_id is None and not (source.path / SINGLE_FILE).is_file():
            raise UnsupportedModel(f"{source.path} has neither {SINGLE_FILE} nor {INDEX_FILE}; save it as safetensors")
        return [SINGLE_FILE]
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise MissingTensors(f"{index} is larger than {MAX_INDEX_BYTES} bytes; fetch the model again")
    try:
        weight_map = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise MissingTensors(f"{index} is not a safetensors index; fetch the model again") from error
    shards = sorted({str(shard) for key, shard in weight_map.items() if wanted(str(key))})
    for shard in shards:
        if Path(shard).name != shard:
            raise MissingTensors(f"{index} names the shard '{shard[:80]}' outside its directory; fetch the model again")
    return shards


def _shard_path(source: ModelSource, shard: str) -> Path:
    local = source.path / shard
    if local.is_file():
        return local
    if source.hub_id is None:
        raise MissingTensors(f"{local} is not there; fetch the model again or take a span without it")
    try:
        return Path(huggingface_hub.hf_hub_download(source.hub_id, shard, revision=source.revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise MissingTensors(
            f"the hub did not give {shard} of {source.hub_id}; check the network and try again"
        ) from error
