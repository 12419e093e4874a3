"""A model whose adapter is trained, in the project's own parts: the blocks of a whole span, and the ends of a client.

The small one is made for this: it learns Python sources for a while, and is saved and loaded like any other.

B: rows, T: tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from blocks.adapters import LoraSettings, UnitTensors, at_rank, unit_shapes, write_units
from blocks.compute import SpanCompute, UnitGradients
from blocks.first_values import first_units
from blocks.load import load_client, load_span
from blocks.loading import loading
from blocks.source import ModelSource, find_model
from blocks.spans import Span, UnitId
from blocks.targets import Targets

_ALPHA = 16.0
_CPU = torch.device("cpu")
_READER = -1
_PRETRAINING_RATE = 3e-3
_PRETRAINING_ROWS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallModel:
    """The shape of the small model, and for how many steps it learns before any adapter does."""

    hidden: int = 128
    layers: int = 2
    steps: int = 600


class Lab:
    """One model's frozen weights, once in memory, and adapters on them."""

    def __init__(self, source: ModelSource, *, rank: int, targets: Targets) -> None:
        self.source, self.rank, self._targets = source, rank, targets
        self.span = Span(0, source.num_blocks)
        self.client = load_client(source, dtype=torch.float32, device=_CPU)
        self._weights: list[Tensor] = []
        self._loaded: dict[tuple[int, int], SpanCompute] = {}
        self._reader = self.adapted(_READER, seed=0)

    def adapted(self, place: int, *, seed: int, own_rank: int = 0) -> SpanCompute:
        """The whole span for the peer at `place`, with its adapter as `seed` initialises it.

        It is the same one whenever the place and the rank are.
        """
        key = place, own_rank % self.rank
        if key not in self._loaded:
            self._loaded[key] = self._load(own_rank % self.rank)
        compute = self._loaded[key]
        compute.settings = compute.model.settings = replace(compute.settings, seed=seed)
        first = first_units(unit_shapes(compute.model), compute.settings.seed)
        live = {unit: at_rank(tensors, compute.settings.live_rank) for unit, tensors in first.items()}
        write_units(compute.model, live)
        return compute

    def gradients(self, compute: SpanCompute, rows_BT: Tensor) -> tuple[UnitGradients, int]:
        """Of the summed loss of all tokens, and how many those are."""
        hidden_BTD = self.client.embed(rows_BT, None)
        output_BTD, stash = compute.forward_train(hidden_BTD, span=self.span, mask_BT=None, seed=0, keep_graph=True)
        _, grad_BTD, tokens = self.client.loss(output_BTD, rows_BT, None, rows_BT)
        return compute.backward(stash, grad_BTD)[1], tokens

    def loss(self, units: Mapping[UnitId, UnitTensors], rows_BT: Tensor) -> float:
        """The mean loss of a token with this adapter, at the run's rank."""
        write_units(self._reader.model, units)
        total, tokens = 0.0, 0
        for rows in torch.split(rows_BT, 16):
            hidden_BTD = self.client.embed(rows, None)
            hidden_BTD = self._reader.forward_eval(hidden_BTD, span=self.span, mask_BT=None, version="live")
            batch_total, batch_tokens = self.client.evaluate(hidden_BTD, rows, None, rows)
            total, tokens = total + float(batch_total), tokens + batch_tokens
        return total / tokens

    def _load(self, own_rank: int) -> SpanCompute:
        model = load_span(self.source, self.span, dtype=torch.float32, device=_CPU)
        weights = list(model.module.parameters())
        self._weights = self._weights or [parameter.data for parameter in weights]
        for parameter, shared in zip(weights, self._weights, strict=True):
            parameter.data = shared
        return SpanCompute(
            model, LoraSettings(seed=0, rank=self.rank, alpha=_ALPHA, targets=self._targets, own_rank=own_rank)
        )


def make_small(shape: SmallModel, rows_NT: Tensor, directory: Path) -> tuple[ModelSource, float]:
    """Train a small model on rows of bytes and save it: where it is, and the loss it came to."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=shape.hidden,
        intermediate_size=3 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=rows_NT.shape[1],
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PRETRAINING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PRETRAINING_RATE, total_steps=shape.steps)
    order = torch.randperm(len(rows_NT))
    loss = torch.zeros(())
    for step in range(shape.steps):
        places = torch.arange(step * _PRETRAINING_ROWS, (step + 1) * _PRETRAINING_ROWS) % len(order)
        rows_BT = rows_NT[order[places]]
        loss = model(input_ids=rows_BT, labels=rows_BT, use_cache=False).loss
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with loading():
        model.save_pretrained(directory)
    return find_model(str(directory), cache_dir=directory), float(loss.detach())
