"""Load a span of a model, or a client's ends of it. Reads only the tensors that the part needs.

B: batch, T: tokens, D: hidden size.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig

from blocks.checkpoint_files import layer_number
from blocks.client import ClientModel, cut_to_client
from blocks.errors import BadSpan, MissingTensors, UnknownModel, UnsupportedModel
from blocks.part import layers_name_of, load_part
from blocks.quantize import Quantization, quantize_layers, unquantized
from blocks.skip import Cut, cut_to_span, poison, run_span
from blocks.source import ModelSource, read_config
from blocks.spans import Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.cache_utils import Cache

    from blocks.adapters import LoraSettings

logger = logging.getLogger(__name__)


class SpanModel:
    """Frozen consecutive blocks of a model; computes any part of them, one forward pass at a time.

    `settings`, `version` and `empty_versions` belong to `adapters.py`: which LoRA is attached, which version of it is
    on, and which add nothing.
    """

    def __init__(self, source: ModelSource, config: PretrainedConfig, module: nn.Module, cut: Cut) -> None:
        self.source = source
        self.config = config
        self.module = module
        self.cut = cut
        self.dtype = cast(torch.dtype, module.dtype)  # what blocks compute in, also once their weights are quantized
        self.settings: LoraSettings | None = None
        self.version = "live"
        self.empty_versions: set[str] = set()

    @property
    def span(self) -> Span:
        """The blocks that are held."""
        return self.cut.span

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return cast(torch.device, self.module.device)

    def forward(
        self,
        hidden_BTD: Tensor,
        *,
        span: Span,
        mask_BT: Tensor | None = None,
        position_ids_BT: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """`hidden_BTD` through the blocks of `span` -> [B, T, D] in the model's dtype; gradients flow.

        With a cache, `mask_BT` covers the cached tokens too.

        Raises:
            BadSpan: `span` is not inside what is held.
        """
        self.cut.activate(span)
        return run_span(
            self.module,
            self.cut,
            hidden_BTD.to(device=self.device, dtype=self.dtype),
            attention_mask=mask_BT,
            position_ids=position_ids_BT,
            past_key_values=cache,
            use_cache=cache is not None,
        )


def load_span(
    source: ModelSource,
    span: Span,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantize: Quantization | None = None,
) -> SpanModel:
    """The blocks of `span`, frozen, in `dtype` on `device`; with `quantize` their linear weights take less memory.

    Raises:
        BadSpan: the model has no such blocks.
        MissingTensors: the checkpoint lacks tensors of these blocks.
        UnsupportedModel: the architecture cannot be cut, or has nothing to quantize.
    """
    if span.end > source.num_blocks:
        raise BadSpan(f"span {span} ends after the {source.num_blocks} blocks of {source.name}; use fewer")
    model = _load_span(source, span, dtype, device, with_outside=False)
    if not _is_finite(model):
        # What stands before the blocks or after them was not read; this family uses it inside the blocks.
        logger.info("span needs tensors outside its blocks model=%s span=%s", source.name, span)
        model = _load_span(source, span, dtype, device, with_outside=True)
        if not _is_finite(model):
            raise UnsupportedModel(f"blocks {span} of {source.name} give non-finite values on zeros; use another dtype")
    if quantize is not None:
        _quantize(model, quantize)
    return model


def load_client(source: ModelSource, *, dtype: torch.dtype, device: torch.device) -> ClientModel:
    """Embedding, final norm and head, frozen, in a transformers model whose only layer is `remote`.

    Raises:
        MissingTensors: the checkpoint lacks tensors of these parts.
        UnsupportedModel: the architecture cannot be cut.
    """
    config = read_config(source)
    layers_name = layers_name_of(config)

    def wanted(key: str) -> bool:
        return layer_number(key, layers_name) is None

    def edit(model: nn.Module) -> None:
        cut_to_client(model, source.num_blocks)

    module, missing = load_part(source, config, edit, wanted, (dtype, device), mixin=ClientModel)
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise MissingTensors(f"{source.name} lacks {len(missing)} tensors outside its blocks, such as {some}")
    client = cast(ClientModel, module)
    if (source.path / "generation_config.json").is_file():
        client.generation_config = GenerationConfig.from_pretrained(source.path, local_files_only=True)
    return client


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        UnknownModel: it has none.
    """
    try:
        return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(source.path, local_files_only=True))
    except (OSError, ValueError, KeyError) as error:
        raise UnknownModel(f"{source.name} has no tokenizer in {source.path}; add its files") from error


def _load_span(
    source: ModelSource, span: Span, dtype: torch.dtype, device: torch.device, with_outside: bool
) -> SpanModel:
    config = read_config(source)
    layers_name = layers_name_of(config)
    cuts: list[Cut] = []

    def edit(model: nn.Module) -> None:
        cut = cut_to_span(model, source.num_blocks, span)
        if not with_outside:
            model._keys_to_ignore_on_load_missing = {f"^{re.escape(name)}$" for name in cut.outside}  # type: ignore[assignment]
        cuts.append(cut)

    def wanted(key: str) -> bool:
        number = layer_number(key, layers_name)
        return with_outside if number is None else number in span

    module, missing = load_part(source, config, edit, wanted, (dtype, device))
    cut = cuts[-1]
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise MissingTensors(f"{source.name} lacks {len(missing)} tensors of blocks {span}, such as {some}")
    if not with_outside:
        poison(module, cut.outside)
    return SpanModel(source, config, module, cut)


def _quantize(model: SpanModel, kind: Quantization) -> None:
    layers = list(model.cut.held.values())
    if not quantize_layers(layers, kind):
        raise UnsupportedModel(
            f"blocks {model.span} of {model.source.name} have no plain linear weights to quantize; leave out --quantize"
        )
    left = unquantized(layers)
    if left:
        named = " ".join(f"{name}={size / 1e6:.1f}MB" for name, size in sorted(left.items()))
        logger.warning("weights that stay as they are with --quantize %s: %s", kind, named)


def _is_finite(model: SpanModel) -> bool:
    """Whether a short pass gives finite values, also when every parameter outside the blocks is NaN."""
    probe_BTD = torch.full((1, 2, model.source.hidden_size), 0.5, device=model.device, dtype=model.dtype)
    with torch.no_grad():
        return bool(torch.isfinite(model.forward(probe_BTD, span=model.span)).all())
