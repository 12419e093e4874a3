"""Turn a GGUF file into a directory of safetensors, once. Leaves out everything about the architecture."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from blocks.errors import UnknownModel, UnsupportedModel
from blocks.loading import loading

logger = logging.getLogger(__name__)

BF16_FILE = "bf16.safetensors"  # beside the fp32 file, so that hosts in bf16 share its pages and need no copy

_CHUNK_BYTES = 1 << 20
_ONE_SHARD = "1000GB"
_FORMAT = "2"  # raise it when the conversion changes, so that old directories are not taken


def convert_gguf(file: Path, cache_dir: Path) -> Path:
    """A directory with config, tokenizer and safetensors of `file` in fp32 and in bf16, made now or before.

    The directory is named by the file's content and appears by one rename, so that a crash or a second process leaves
    no half of it.

    Raises:
        UnsupportedModel: transformers cannot read this GGUF file, or the package `gguf` is not installed.
        UnknownModel: the directory for converted models cannot be written.
    """
    target = cache_dir / f"{file.stem[:80]}-{_identity(file)}"
    if (target / "config.json").is_file():
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".converting-", dir=cache_dir))
    except OSError as error:
        raise UnknownModel(
            f"cannot write converted models to {cache_dir} ({error.strerror}); free space or check its permissions"
        ) from error
    try:
        with loading(), _parsed_once():
            _convert(file, work)
        try:
            os.rename(work, target)
        except OSError:
            if not (target / "config.json").is_file():  # else another process was faster, with the same bytes
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    logger.info("model converted file=%s directory=%s", file, target)
    return target


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Let transformers' four reads of a GGUF header share one that uses plain arrays: they took most of the time.

    Raises:
        UnsupportedModel: the package `gguf` is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise UnsupportedModel("a GGUF file needs the package gguf; pip install 'swarmtune[demo]'") from error

    class PlainReader(gguf.GGUFReader):  # type: ignore[misc]
        """numpy's memmap runs Python code at every slice, and a header is a million slices."""

        @property
        def data(self) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
            return self._plain

        @data.setter
        def data(self, mapped: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
            self._plain = mapped.view(np.ndarray)

    original = gguf.GGUFReader
    gguf.GGUFReader = functools.cache(PlainReader)
    try:
        yield
    finally:
        gguf.GGUFReader = original


def _convert(file: Path, work: Path) -> None:
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        loaded = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, config=config, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (ImportError, ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UnsupportedModel(
            f"cannot read {file} ({reason}); fetch it again, or use the model as safetensors"
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    config.dtype = torch.float32
    # A model that was loaded from GGUF refuses to be saved, so its weights move into one that was not.
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.generation_config = loaded.generation_config
    fresh.save_pretrained(work, max_shard_size=_ONE_SHARD)
    if not fresh._keep_in_fp32_modules_strict:  # else bf16 would lose what the family keeps in fp32
        weights = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(work / "model.safetensors").items()}
        save_file(weights, work / BF16_FILE, metadata={"format": "pt"})
    tokenizer.save_pretrained(work)


def _identity(file: Path) -> str:
    """A name for the file's content: size, head and tail, which in GGUF hold all metadata and the last tensors."""
    size = file.stat().st_size
    digest = hashlib.sha256(f"{_FORMAT}:{size}:".encode())
    with file.open("rb") as stream:
        digest.update(stream.read(_CHUNK_BYTES))
        for part in range(1, 9):
            stream.seek(max(0, size * part // 9 - _CHUNK_BYTES))
            digest.update(stream.read(_CHUNK_BYTES))
        stream.seek(max(0, size - _CHUNK_BYTES))
        digest.update(stream.read(_CHUNK_BYTES))
    return digest.hexdigest()[:16]
