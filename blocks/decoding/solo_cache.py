"""transformers' own caches, for one session a pass: for families that cannot share passes, and to check those that can.

D: hidden size.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DummyLayer, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from blocks.adapters import LIVE, use_version
from blocks.decoding.slots import LayerShape
from blocks.load import SpanModel
from blocks.spans import Span


class RollbackSlidingLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A sliding-window layer that forgets nothing, so that it can roll back as far as full attention can.

    transformers' own drops what is out of the window at the first rollback, and a second, deeper one is then wrong.
    """

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window)
        self.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens."""
        if tokens_to_remove < 0 and self.is_initialized:
            self.keys = cast(Tensor, self.keys)[:, :, :tokens_to_remove]  # type: ignore[has-type]
            self.values = cast(Tensor, self.values)[:, :, :tokens_to_remove]  # type: ignore[has-type]
            self.cumulative_length += tokens_to_remove


def solo_cache(model: SpanModel, span: Span) -> Cache:
    """An empty cache of the family's own kinds of layers for the blocks of `span`, nothing for the others."""
    cache = cast(Cache, DynamicCache(config=model.config))
    for number, layer in enumerate(cache.layers):
        if number not in span:
            cache.layers[number] = DummyLayer()
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[number] = RollbackSlidingLayer(layer.sliding_window)
    return cache


def measure_layers(model: SpanModel) -> tuple[dict[int, int], dict[int, LayerShape] | None]:
    """What each held block caches for one position, measured on one token as families differ -> (bytes, shapes).

    No shapes if a block keeps more or other things than keys and values by head; such blocks cannot share passes.
    """
    cache = solo_cache(model, model.span)
    probe_BTD = torch.zeros(1, 1, model.source.hidden_size, device=model.device)
    if model.settings is not None:
        use_version(model, LIVE)
    with torch.no_grad():
        model.forward(probe_BTD, span=model.span, cache=cache)
    num_bytes: dict[int, int] = {}
    shapes: dict[int, LayerShape] = {}
    plain = True
    for number in model.span.blocks():
        layer = cache.layers[number]
        tensors = [tensor for tensor in (layer.keys, layer.values) if tensor is not None]
        num_bytes[number] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        plain = plain and type(layer) in (DynamicLayer, RollbackSlidingLayer)
        if plain and len(tensors) == 2:
            keys, values = tensors
            shapes[number] = LayerShape(
                key_HD=(keys.shape[1], keys.shape[3]),
                value_HD=(values.shape[1], values.shape[3]),
                dtype=keys.dtype,
                window=layer.sliding_window if isinstance(layer, RollbackSlidingLayer) else None,
            )
    return num_bytes, shapes if plain and shapes else None
