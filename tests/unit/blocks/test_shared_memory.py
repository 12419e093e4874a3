"""Processes on one machine share frozen weights: they are mapped from their file, not copied."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blocks.gguf import BF16_FILE
from blocks.load import SpanModel, load_span
from blocks.source import SINGLE_FILE, ModelSource, find_model
from blocks.spans import Span
from tests.unit.blocks.conftest import CPU, save_tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """One fp32 file with a bf16 file beside it, as a GGUF file is converted to."""
    directory = tmp_path_factory.mktemp("model")
    whole = save_tiny("llama", directory)
    for shard in directory.glob("model*"):
        shard.unlink()
    whole.save_pretrained(directory)  # in one file
    halves = {name: tensor.bfloat16() for name, tensor in load_file(directory / SINGLE_FILE).items()}
    save_file(halves, directory / BF16_FILE, metadata={"format": "pt"})
    return find_model(str(directory), cache_dir=directory / "cache")


def mapped_from(model: SpanModel, file: Path) -> list[bool]:
    """For each weight of the blocks, whether its memory is the file's."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(file)):
            start, _, end = line.split()[0].partition("-")
            ranges.append((int(start, 16), int(end, 16)))
    weights = [weight for layer in model.cut.held.values() for weight in layer.parameters()]
    return [any(start <= weight.data_ptr() < end for start, end in ranges) for weight in weights]


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, SINGLE_FILE), (torch.bfloat16, BF16_FILE)])
def test_weights_are_the_files_own_memory(source: ModelSource, dtype: torch.dtype, name: str) -> None:
    found = mapped_from(load_span(source, Span(1, 3), dtype=dtype, device=CPU), source.path / name)
    assert len(found) == 2 * 9
    assert all(found)


def test_the_bf16_file_gives_the_same_weights_as_rounding_the_fp32_file(source: ModelSource, tmp_path: Path) -> None:
    (tmp_path / SINGLE_FILE).symlink_to(source.path / SINGLE_FILE)
    (tmp_path / "config.json").symlink_to(source.path / "config.json")
    alone = replace(source, path=tmp_path)
    one, other = (load_span(s, Span(1, 3), dtype=torch.bfloat16, device=CPU).module for s in (source, alone))
    named = dict(other.named_parameters())
    assert all(torch.equal(p, named[n]) for n, p in one.named_parameters() if ".layers." in n)
