"""The same training in one process with plain transformers, peft and torch: what a swarm's result is compared with."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from blocks.first_values import initial_tensor
from blocks.source import ModelSource
from blocks.spans import unit_of
from swarm.config import RunSpec
from swarm.data.stream import DataStream, SampleSet, split_microbatches
from swarm.training.jobs import TOKEN_BUDGET

TARGETS = ("q_proj", "v_proj")


def local_model(source: ModelSource) -> PreTrainedModel:
    """The whole model in fp32, as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()


@dataclass(frozen=True, kw_only=True)
class ReferenceRun:
    """Losses (mean per label token of each batch), and the adapter after the last step by block and tensor name."""

    losses: list[float]
    tensors: dict[tuple[int, str], torch.Tensor]


class _Adapter:
    """peft's LoRA on the whole model, with the run's first values; parameters by block."""

    def __init__(self, source: ModelSource, spec: RunSpec) -> None:
        lora = LoraConfig(
            r=spec.adapter.lora_rank,
            lora_alpha=spec.adapter.lora_alpha,
            target_modules=list(TARGETS),
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # read by peft
            self.model: PeftModel = get_peft_model(local_model(source), lora)
        self.by_block: dict[int, dict[str, torch.nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                block, _, inner = name.partition(".layers.")[2].partition(".")
                short = inner.removesuffix(".default.weight")
                self.by_block.setdefault(int(block), {})[short] = parameter
        with torch.no_grad():
            for number, named in self.by_block.items():
                unit = unit_of(spec.adapter.name, number)
                for name, parameter in named.items():
                    parameter.copy_(initial_tensor(spec.adapter.seed, unit, name, tuple(parameter.shape)))

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for named in self.by_block.values() for parameter in named.values()]


def run_reference(source: ModelSource, spec: RunSpec, data: SampleSet, *, steps: int) -> ReferenceRun:
    """Train batch by batch: the gradient of the mean over a batch's label tokens, clipped per block, one AdamW."""
    adapter = _Adapter(source, spec)
    training = spec.training
    adamw = torch.optim.AdamW(adapter.parameters, lr=training.learning_rate, weight_decay=training.weight_decay)
    stream = DataStream(data, training.batch_size, spec.adapter.seed)
    losses = []
    for _ in range(steps):
        microbatches = split_microbatches(next(stream).samples, TOKEN_BUDGET)
        tokens = sum(microbatch.num_label_tokens for microbatch in microbatches)
        total = 0.0
        for microbatch in microbatches:
            output = adapter.model(input_ids=microbatch.input_ids_BT, attention_mask=microbatch.mask_BT)
            loss = functional.cross_entropy(
                output.logits[:, :-1].flatten(0, 1), microbatch.labels_BT[:, 1:].flatten(), reduction="sum"
            )
            (loss / tokens).backward()
            total += float(loss.detach())
        if training.clip_norm > 0:
            for named in adapter.by_block.values():
                torch.nn.utils.clip_grad_norm_(named.values(), training.clip_norm)
        adamw.step()
        adamw.zero_grad()
        losses.append(total / tokens)
    tensors = {
        (block, name): parameter.detach().clone()
        for block, named in adapter.by_block.items()
        for name, parameter in named.items()
    }
    return ReferenceRun(losses=losses, tensors=tensors)


def greatest_difference(first: Sequence[float], second: Sequence[float]) -> float:
    """Of two series of equal length."""
    return max(abs(a - b) for a, b in zip(first, second, strict=True))
