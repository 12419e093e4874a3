"""A unit's state as a message and its tensors, and back: checked against its own digest."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from blocks.spans import UnitId
from blocks.unit_state import UnitState, agreed, joined, split
from peers.errors import BadMessage
from peers.streams.calls import Answer
from peers.streams.messages import UnitReply

Digest = Callable[[Mapping[str, torch.Tensor]], bytes]
M = TypeVar("M", bound=UnitReply)


def packed(state: UnitState, message_type: type[M]) -> tuple[M, tuple[torch.Tensor, ...]]:
    """The message of that type which carries `state`, and its tensors."""
    named = joined(state)
    message = message_type(
        unit=state.unit,
        round=state.round,
        weight=state.weight,
        total_samples=state.total_samples,
        digest=state.digest,
        names=tuple(named),
    )
    return message, tuple(named.values())


def as_answer(state: UnitState) -> Answer:
    """The answer to a FetchUnit."""
    message, tensors = packed(state, UnitReply)
    return Answer(message=message, tensors=tensors)


async def unpacked(message: UnitReply, tensors: Sequence[torch.Tensor], unit: UnitId, *, digest: Digest) -> UnitState:
    """The state of `unit` that a message carries.

    Raises:
        BadMessage: it is of another unit, or its fields, its tensors and its digest do not belong together.
    """
    if message.unit != unit or len(message.names) != len(tensors):
        raise BadMessage(f"{unit} was asked for, and something else came")
    if len(set(message.names)) != len(message.names) or message.weight < 0:
        raise BadMessage(f"{unit} came with doubled names or a negative weight")
    if any(tensor.dtype != torch.float32 for tensor in tensors):
        raise BadMessage(f"{unit} came with a tensor that is not fp32")
    own, outer, moments = split(dict(zip(message.names, tensors, strict=True)))
    if await asyncio.to_thread(digest, agreed(own, outer)) != message.digest:
        raise BadMessage(f"{unit} came with a digest that does not match its tensors")
    return UnitState(
        unit=unit,
        round=message.round,
        weight=message.weight,
        total_samples=message.total_samples,
        digest=message.digest,
        tensors=own,
        outer=outer,
        moments=moments,
    )
