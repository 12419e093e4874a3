"""Cut a Hugging Face decoder down to some of its layers: the others become pass-throughs, none is renumbered.

Masks, rotary tables, sliding windows, caches and checkpoint keys stay the family's own, because the model keeps its
full config and its full list of layers. Leaves out where the weights come from: see `load.py`.

B: batch, T: tokens, D: hidden size.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from blocks.errors import BadSpan, UnsupportedModel
from blocks.spans import Span

ANYTHING = frozenset({"**"})
LayerForward = Callable[..., object]


class Skip(nn.Module):
    """Stands for a layer that is not here: no parameters, hands the hidden states on as the family's layers do."""

    def __init__(self, layer: nn.Module, returns_tuple: bool) -> None:
        """`layer` lends its plain attributes (`attention_type`, `layer_type`, ...), which backbones look at."""
        super().__init__()
        for name, value in vars(layer).items():
            if not name.startswith("_") and name != "training" and isinstance(value, (str, int, float, bool)):
                setattr(self, name, value)
        self.skip_returns_tuple = returns_tuple

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> object:
        """The hidden states, unchanged."""
        return (hidden_states, None) if self.skip_returns_tuple else hidden_states


class NoEmbedding(nn.Module):
    """Stands for the token embedding or the head of a model that needs neither: hands its input on."""

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim

    def forward(self, inputs: Tensor, *args: object, **kwargs: object) -> Tensor:
        """The input, unchanged."""
        return inputs


@dataclass(kw_only=True, slots=True)
class Cut:
    """What was cut, and the state of the one forward pass that may run at a time.

    `held` are the real layers by number; `active` is the part of them that the current pass computes.
    """

    span: Span
    layers_name: str
    embedding_dim: int
    held: dict[int, nn.Module]
    active: Span
    entering_BTD: Tensor | None = None
    leaving_BTD: Tensor | None = None
    outside: list[str] = field(default_factory=list)
    accepted: frozenset[str] = frozenset()  # what the backbone takes by name, once it was looked up

    def activate(self, span: Span) -> None:
        """Choose the part of the held span that passes compute from now on.

        Raises:
            BadSpan: it is not inside what is held.
        """
        if not self.span.covers(span):
            raise BadSpan(f"blocks {span} were asked of a model that holds {self.span}; ask a peer that holds them")
        self.active = span


def find_layers(model: nn.Module, num_layers: int) -> tuple[str, nn.ModuleList]:
    """The path and the list of the decoder's layers: the shallowest `ModuleList` of that length.

    Raises:
        UnsupportedModel: there is none.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if not found:
        raise UnsupportedModel(f"{type(model).__name__} has no list of {num_layers} layers; use another model")
    return min(found, key=lambda pair: pair[0].count("."))


def returns_tuple(layer: nn.Module) -> bool:
    """Whether this family's layers return `(hidden, ...)`; read from the source, as nothing else tells."""
    source = inspect.getsource(inspect.unwrap(type(layer).forward))
    returned = re.findall(r"^\s*return (.+)$", source, re.MULTILINE)
    last = returned[-1].strip() if returned else ""
    return last.startswith("(") or "," in last or last == "outputs"


def cut_to_span(model: nn.Module, num_layers: int, span: Span) -> Cut:
    """Keep the layers of `span` in `model`, drop all others, the embedding and the head.

    To be called on the meta device, before weights are read, so that nothing foreign is ever allocated.
    """
    layers_name, layers = find_layers(model, num_layers)
    as_tuple = returns_tuple(layers[span.start])
    embedding = cast(nn.Module, model.get_input_embeddings())  # type: ignore[operator]
    embedding_dim = int(embedding.embedding_dim)  # type: ignore[arg-type]
    cut = Cut(span=span, layers_name=layers_name, embedding_dim=embedding_dim, held={}, active=span)
    for number in range(num_layers):
        if number in span:
            cut.held[number] = layers[number]
            _gate(layers[number], number, cut, as_tuple)
        else:
            layers[number] = Skip(layers[number], as_tuple)
    head = cast("nn.Module | None", model.get_output_embeddings())  # type: ignore[operator]
    _replace(model, [embedding] if head is None else [embedding, head], NoEmbedding(embedding_dim))
    untie(model)
    prefix = f"{layers_name}."
    cut.outside = [name for name, _ in model.named_parameters() if not name.startswith(prefix)]
    return cut


def untie(model: nn.Module) -> None:
    """Forget which weights are tied: the ties name modules that are no longer there."""
    model.all_tied_weights_keys = {}  # type: ignore[assignment]
    model._tied_weights_keys = {}  # type: ignore[assignment]


def backbone_of(model: nn.Module) -> nn.Module:
    """The decoder without its language-model head."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if get_decoder is not None else None
    return cast(nn.Module, model.base_model if decoder is None or decoder is model else decoder)


def run_span(model: nn.Module, cut: Cut, hidden_BTD: Tensor, **kwargs: object) -> Tensor:
    """`hidden_BTD` through the active layers -> [B, T, D]; `kwargs` go to the family's backbone, `None`s left out.

    Whatever the backbone does before and after the active layers is thrown away: their input is put in place of it.
    """
    backbone = backbone_of(model)
    accepted = cut.accepted or _parameters(backbone)
    cut.accepted = accepted
    given = {
        name: value
        for name, value in kwargs.items()
        if value is not None and (accepted is ANYTHING or name in accepted)
    }
    batch, tokens = hidden_BTD.shape[:2]
    embeds = hidden_BTD.detach()
    if cut.embedding_dim != hidden_BTD.shape[-1]:
        embeds = hidden_BTD.new_zeros(batch, tokens, cut.embedding_dim)
    cut.entering_BTD, cut.leaving_BTD = hidden_BTD, None
    try:
        backbone(inputs_embeds=embeds, **given)
        if cut.leaving_BTD is None:
            raise UnsupportedModel(f"{type(backbone).__name__} did not call its layers {cut.active}; use another model")
        return cut.leaving_BTD
    finally:
        cut.entering_BTD = cut.leaving_BTD = None


def _parameters(backbone: nn.Module) -> frozenset[str]:
    """What the backbone's forward accepts by name; `ANYTHING` if it takes any keyword."""
    parameters = inspect.signature(inspect.unwrap(type(backbone).forward)).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return ANYTHING
    return frozenset(parameters)


def _gate(layer: nn.Module, number: int, cut: Cut, as_tuple: bool) -> None:
    """Let `cut` decide at each pass whether `layer` computes, takes over the span's input, or gives its output."""
    compute = cast(LayerForward, layer.forward)

    @functools.wraps(compute)
    def forward(*args: object, **kwargs: object) -> object:
        active = cut.active
        hidden = cast(Tensor, args[0] if args else kwargs["hidden_states"])
        if number not in active:
            return (hidden, None) if as_tuple else hidden
        if number == active.start:
            if args:
                args = (cut.entering_BTD, *args[1:])
            else:
                kwargs["hidden_states"] = cut.entering_BTD
        output = compute(*args, **kwargs)
        if number == active.end - 1:
            cut.leaving_BTD = cast(Tensor, output[0] if isinstance(output, (tuple, list)) else output)
        return output

    layer.forward = forward


def _replace(model: nn.Module, old: list[nn.Module], new: nn.Module) -> None:
    """Put `new` wherever a module of `old` stands, under whatever names."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if any(child is one for one in old):
                module._modules[name] = new


def poison(model: nn.Module, names: list[str]) -> None:
    """Fill parameters that were not read with NaN, so that a family that does use them cannot do so unseen."""
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).fill_(float("nan"))
