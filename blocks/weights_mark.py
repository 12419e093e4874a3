"""Telling the run's weights from others of the same shape: a few values of every block, hashed.

The architecture's fingerprint is equal for a base model and its fine-tuned sisters; computing with the wrong one would
go unnoticed. Values are compared in bf16, so that copies saved in fp32 and in bf16 agree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import cast

import torch

from blocks.checkpoint_files import LazyTensor, layer_number, open_tensors
from blocks.errors import MissingTensors
from blocks.part import layers_name_of
from blocks.source import ModelSource, read_config

MARK_DIGITS = 4  # a wrong model differs in nearly all blocks, so each needs to tell but little
_TENSORS = 4  # of each block, spread over its names
_VALUES = 64  # of each tensor's first row
OUTSIDE = -1  # the embedding, norms and head


def weights_marks(source: ModelSource) -> str:
    """Hex digits: 4 for what is outside the blocks, then 4 for each block. Empty where not all of it is on disk."""
    layers_name = layers_name_of(read_config(source))
    try:
        return "".join(_mark_of(source, part, layers_name) for part in range(OUTSIDE, source.num_blocks))
    except MissingTensors:
        return ""


def wrong_parts(source: ModelSource, marks: str, parts: Iterable[int]) -> list[int]:
    """Those of `parts` (block numbers, or OUTSIDE) whose values are not those that `marks` tells of.

    Raises:
        MissingTensors: the checkpoint has no such tensors here.
    """
    if not marks:
        return []
    layers_name = layers_name_of(read_config(source))
    return [part for part in parts if _mark_of(source, part, layers_name) != _told(marks, part)]


def _told(marks: str, part: int) -> str:
    start = (part - OUTSIDE) * MARK_DIGITS
    return marks[start : start + MARK_DIGITS]


def _mark_of(source: ModelSource, part: int, layers_name: str) -> str:
    def wanted(key: str) -> bool:
        number = layer_number(key, layers_name)
        return number == part if part != OUTSIDE else number is None

    digest = hashlib.sha256()
    with open_tensors(source, wanted) as tensors:
        names = sorted(tensors)
        if not names:
            raise MissingTensors(f"{source.path} has no tensors of part {part}; fetch the model again")
        for name in names[:: max(1, len(names) // _TENSORS)][:_TENSORS]:
            digest.update(name.rpartition(f"{layers_name}.")[2].encode())
            digest.update(_sample(tensors[name]))
    return digest.hexdigest()[:MARK_DIGITS]


def _sample(tensor: LazyTensor) -> bytes:
    row = cast(torch.Tensor, tensor[:1]).flatten()
    if row.numel() < _VALUES:
        row = cast(torch.Tensor, tensor[:_VALUES]).flatten()
    values = row[:_VALUES].to(torch.float32).to(torch.bfloat16)
    return values.contiguous().view(torch.uint8).numpy().tobytes()
