"""One forward pass for several sessions, and the question whether a family can be computed so.

B: rows of one session or of a pass, T: new tokens, D: hidden size, K: positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from blocks.adapters import LIVE, use_version
from blocks.decoding.row_versions import use_row_versions
from blocks.decoding.slot_view import Rows, SlotView
from blocks.decoding.slots import LayerShape, SlotStore, capacity_for
from blocks.decoding.solo_cache import solo_cache
from blocks.load import SpanModel
from blocks.spans import Span

_PROBE_TOKENS = (5, 3)  # of two sessions at first; then each goes on with one
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # others: the noise of 16 bits, and of quantized weights
_LOW_PRECISION_TOLERANCE = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class PassInput:
    """One session's part of a pass: its rows and their inputs. `mask_BK` covers all up to the last new token."""

    rows: Rows
    hidden_BTD: Tensor
    mask_BK: Tensor | None
    position_ids_BT: Tensor | None
    version: str


def run_together(model: SpanModel, store: SlotStore, span: Span, inputs: Sequence[PassInput]) -> list[Tensor]:
    """The new tokens of all sessions through the blocks of `span` -> an output [B, T, D] for each, in its order.

    Sessions of equal position and length are computed just as one batch of them would be; else rows are padded on the
    right up to the longest. Nothing but the cache's contents behind each session's position changes.
    """
    order = sorted(
        range(len(inputs)), key=lambda at: (id(inputs[at].rows.placement.pool), inputs[at].rows.placement.start)
    )
    sorted_inputs = [inputs[at] for at in order]
    view = SlotView(model.source.num_blocks, [one.rows for one in sorted_inputs], store.windows)
    versions = {one.version for one in inputs}
    if model.settings is not None and len(versions) == 1:
        use_version(model, inputs[0].version)
    version_B = [one.version for one in sorted_inputs for _ in one.rows.placement.rows()]
    mixed = use_row_versions(model, version_B) if len(versions) > 1 else nullcontext()
    with mixed, torch.no_grad():
        output_BTD = model.forward(
            _joined_hidden(model, sorted_inputs, view.tokens),
            span=span,
            mask_BT=_joined_mask(model, sorted_inputs, view),
            position_ids_BT=_joined_positions(model, sorted_inputs, view),
            cache=view,
        )
    outputs: dict[int, Tensor] = {}
    offset = 0
    for at, one in zip(order, sorted_inputs, strict=True):
        count = one.rows.placement.count
        outputs[at] = output_BTD[offset : offset + count, : one.rows.tokens]
        offset += count
    return [outputs[at] for at in range(len(inputs))]


def why_not_together(model: SpanModel, shapes: dict[int, LayerShape] | None) -> str | None:
    """The reason why this family's sessions cannot share passes, found by trying; None if they can.

    Two sessions at different positions are computed together and one by one with the family's own cache.
    """
    if shapes is None:
        return "its blocks keep other things than keys and values"
    try:
        together = _probe_together(model, shapes)
        alone = [_probe_alone(model, at) for at in range(len(_PROBE_TOKENS))]
    except Exception as error:  # whatever a family does not like is the reason
        return f"{type(error).__name__}: {str(error)[:200]}"
    tolerance = _TOLERANCE.get(model.dtype, _LOW_PRECISION_TOLERANCE)
    for got, want in zip(together, alone, strict=True):
        off = float((got - want).norm() / want.norm().clamp_min(1e-12))
        if not off <= tolerance:
            return f"sessions together are off by {off:.1e}, and {tolerance:.0e} is allowed"
    return None


def _joined_hidden(model: SpanModel, inputs: Sequence[PassInput], tokens: int) -> Tensor:
    parts = [one.hidden_BTD.to(device=model.device, dtype=model.dtype) for one in inputs]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([_longer(part, tokens) for part in parts])


def _joined_mask(model: SpanModel, inputs: Sequence[PassInput], view: SlotView) -> Tensor | None:
    if view.uniform and all(one.mask_BK is None for one in inputs):
        return None
    if len(inputs) == 1:
        return inputs[0].mask_BK
    parts = []
    for one in inputs:
        part = one.mask_BK
        if part is None:
            part = torch.ones(one.rows.placement.count, one.rows.end, dtype=torch.long)
        parts.append(_longer(part.to(device=model.device, dtype=torch.long), view.length))
    return torch.cat(parts)


def _joined_positions(model: SpanModel, inputs: Sequence[PassInput], view: SlotView) -> Tensor | None:
    if view.uniform and all(one.position_ids_BT is None for one in inputs):
        return None
    if len(inputs) == 1:
        return inputs[0].position_ids_BT
    parts = []
    for one in inputs:
        part = one.position_ids_BT
        if part is None:
            part = torch.arange(one.rows.position, one.rows.end)[None]
        part = part.to(model.device).expand(one.rows.placement.count, -1)
        last = part[:, -1:].expand(-1, view.tokens - part.shape[1])
        parts.append(torch.cat([part, last], 1))
    return torch.cat(parts)


def _longer(part: Tensor, size: int) -> Tensor:
    """With zeros behind, up to `size` along the second dimension."""
    missing = size - part.shape[1]
    return part if not missing else torch.cat([part, part.new_zeros(part.shape[0], missing, *part.shape[2:])], 1)


def _probe_hidden(model: SpanModel, at: int) -> Tensor:
    generator = torch.Generator().manual_seed(at)
    return torch.randn(1, _PROBE_TOKENS[at] + 1, model.source.hidden_size, generator=generator)


def _probe_alone(model: SpanModel, at: int) -> Tensor:
    hidden_BTD = _probe_hidden(model, at)
    cache = solo_cache(model, model.span)
    with torch.no_grad():
        tokens = _PROBE_TOKENS[at]
        halves = (hidden_BTD[:, :tokens], hidden_BTD[:, tokens:])
        parts = [model.forward(half, span=model.span, cache=cache) for half in halves]
    return torch.cat(parts, 1).float()


def _probe_together(model: SpanModel, shapes: dict[int, LayerShape]) -> list[Tensor]:
    store = SlotStore(shapes, 1 << 62, model.device)
    sessions = [store.place(model.span, 1, capacity_for(tokens + 1)) for tokens in _PROBE_TOKENS]
    halves: list[list[Tensor]] = []
    for first in (True, False):
        inputs = []
        for at, (placement, tokens) in enumerate(zip(sessions, _PROBE_TOKENS, strict=True)):
            hidden_BTD = _probe_hidden(model, at)
            position, part = (0, hidden_BTD[:, :tokens]) if first else (tokens, hidden_BTD[:, tokens:])
            rows = Rows(placement=placement, position=position, tokens=part.shape[1])
            inputs.append(PassInput(rows=rows, hidden_BTD=part, mask_BK=None, position_ids_BT=None, version=LIVE))
        halves.append(run_together(model, store, model.span, inputs))
    return [torch.cat([first, second], 1).float() for first, second in zip(*halves, strict=True)]
