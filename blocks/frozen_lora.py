"""How a linear module computes with a frozen version of the LoRA: peft's arithmetic without peft's bookkeeping.

peft finds out anew in each call which adapters are active and what each of them wants, which costs a few percent of a
token's time in a small model. B and A: the two factors of the LoRA (Hu et al. 2021).
"""

from __future__ import annotations

from functools import partial
from typing import cast

from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from torch.nn import functional


def freeze_on(lora: LoraLayer, label: str, *, adds_nothing: bool) -> None:
    """Let the module compute with version `label`, or without any, until `thaw`. For passes without gradients.

    Other kinds of modules than plain linear ones are left to peft.
    """
    if type(lora) is not Linear:
        return
    base = cast(nn.Module, lora.base_layer)
    if adds_nothing:
        lora.forward = base.forward
        return
    a, b = (cast(Tensor, modules[label].weight) for modules in (lora.lora_A, lora.lora_B))
    lora.forward = partial(_forward, base, a, b, float(lora.scaling[label]))


def thaw(lora: LoraLayer) -> None:
    """Leave the module to peft again."""
    lora.__dict__.pop("forward", None)


def _forward(
    base: nn.Module, a: Tensor, b: Tensor, scaling: float, x: Tensor, *args: object, **kwargs: object
) -> Tensor:
    result = cast(Tensor, base.forward(x, *args, **kwargs))
    added = functional.linear(functional.linear(x.to(a.dtype), a), b)
    return (result + added * scaling).to(result.dtype)
