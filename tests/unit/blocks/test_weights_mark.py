"""Whether weights of another model of the same shape are told apart."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from blocks.source import ModelSource, find_model
from blocks.weights_mark import MARK_DIGITS, OUTSIDE, weights_marks, wrong_parts


def copy_of(source: ModelSource, directory: Path, *, dtype: torch.dtype, add: float = 0.0) -> ModelSource:
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.model.layers[3].parameters():
            parameter.add_(add)
    model.to(dtype).save_pretrained(directory)
    return find_model(str(directory), cache_dir=directory)


def test_marks_name_every_block_and_what_is_outside(llama_source: ModelSource) -> None:
    marks = weights_marks(llama_source)
    assert len(marks) == MARK_DIGITS * (llama_source.num_blocks + 1)
    assert wrong_parts(llama_source, marks, range(OUTSIDE, llama_source.num_blocks)) == []


def test_a_copy_in_another_dtype_is_the_same_model(llama_source: ModelSource, tmp_path: Path) -> None:
    copy = copy_of(llama_source, tmp_path / "bf16", dtype=torch.bfloat16)
    assert weights_marks(copy) == weights_marks(llama_source)


def test_a_block_with_other_values_is_found_though_the_architecture_is_the_same(
    llama_source: ModelSource, tmp_path: Path
) -> None:
    other = copy_of(llama_source, tmp_path / "other", dtype=torch.float32, add=0.5)
    assert other.fingerprint == llama_source.fingerprint
    assert wrong_parts(other, weights_marks(llama_source), range(OUTSIDE, 6)) == [3]


def test_a_run_without_marks_accepts_what_its_revision_names(llama_source: ModelSource) -> None:
    assert wrong_parts(llama_source, "", range(6)) == []
