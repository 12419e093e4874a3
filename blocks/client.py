"""The client's ends of a model: embedding, norm, head and `generate()`, with one layer that is a remote chain.

It stays the family's own transformers class, so sampling, beams, streamers and assisted generation work as they do
there. Leaves out how the chain is reached: that is the `remote` callable.

B: batch, T: tokens, D: hidden size, V: vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation.candidate_generator import CandidateGenerator

from blocks.decoding.lookup import AdaptiveLookup
from blocks.errors import BadSession, BlockError
from blocks.skip import Skip, find_layers, returns_tuple

IGNORED_LABEL = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteCall:
    """What the chain is asked to compute: `hidden_BTD` enters block 0, the answer is what leaves the last block.

    `mask_BT` covers the `start` positions before this call as well. `start` smaller than what the chain has seen
    means that it is to roll back. `rows` is set when beams were reordered since the last call: row i of this call goes
    on from row `rows[i]` of the one before. `cached` is false for a call that needs no session.
    """

    hidden_BTD: Tensor
    mask_BT: Tensor | None
    position_ids_BT: Tensor | None
    start: int
    rows: tuple[int, ...] | None
    cached: bool


Remote = Callable[[RemoteCall], Tensor]


class _CountingLayer(CacheLayerMixin):  # type: ignore[misc]
    """Counts positions and notes how rows moved; keys and values are at the hosts."""

    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self.batch = 0
        self.rows: tuple[int, ...] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """A client has no attention that could call this."""
        raise BlockError("a layer of the client asked for keys and values; this model cannot be driven remotely")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.length, self.rows = 0, None

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0 or -tokens_to_remove > self.length:
            raise BadSession(f"cannot remove {tokens_to_remove} of {self.length} positions; pass a negative count")
        self.length += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._move([int(row) for row in beam_idx.tolist()])

    def batch_select_indices(self, indices: Tensor) -> None:
        self._move([int(row) for row in indices.tolist()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._move([row for row in range(self.batch) for _ in range(repeats)])

    def _move(self, moved: list[int]) -> None:
        before = tuple(range(self.batch)) if self.rows is None else self.rows
        self.rows = tuple(before[row] for row in moved)
        self.batch = len(moved)


class CountingCache(Cache):  # type: ignore[misc]
    """A session as the client sees it: how many positions, and which row goes on from which."""

    def __init__(self) -> None:
        self.counter = _CountingLayer()
        super().__init__(layers=[self.counter])

    def advance(self, batch: int, tokens: int) -> None:
        """The chain has computed `tokens` more positions of `batch` rows; the moves are told."""
        self.counter.batch, self.counter.rows = batch, None
        self.counter.length += tokens


class _RemoteLayer(Skip):
    """The only layer of a client."""

    client: ClientModel

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> object:
        """Ask the chain; the answer comes back in the dtype and on the device of the question."""
        output = self.client.call_remote(hidden_states)
        return (output, None) if self.skip_returns_tuple else output


class ClientModel:
    """Mixed into a family's class by `load_client`: everything of the model that is not in a block."""

    remote: Remote | None = None
    _arguments: Mapping[str, object] = {}

    if TYPE_CHECKING:  # what the family's class brings
        config: PretrainedConfig
        generation_config: object
        generate: Callable[..., Tensor]
        device: torch.device
        dtype: torch.dtype
        __call__: Callable[..., object]

    @property
    def token_count(self) -> int:
        """How many tokens the model tells apart, padding rows of its embedding included."""
        return int(self.config.get_text_config().vocab_size)

    def call_remote(self, hidden_BTD: Tensor) -> Tensor:
        """Send what entered the remote layer, with what the family's forward was called with."""
        if self.remote is None:
            raise BlockError("the client has no chain; set client.remote before computing")
        cache = cast("Cache | None", self._arguments.get("past_key_values"))
        if cache is not None and not isinstance(cache, CountingCache):
            raise BadSession(f"the client cannot use a {type(cache).__name__}; pass a CountingCache or none")
        call = RemoteCall(
            hidden_BTD=hidden_BTD,
            mask_BT=cast("Tensor | None", self._arguments.get("attention_mask")),
            position_ids_BT=cast("Tensor | None", self._arguments.get("position_ids")),
            start=0 if cache is None else cache.counter.length,
            rows=None if cache is None else cache.counter.rows,
            cached=cache is not None,
        )
        output_BTD = self.remote(call).to(device=hidden_BTD.device, dtype=hidden_BTD.dtype)
        if output_BTD.shape != hidden_BTD.shape:
            raise BadSession(f"the chain answered shape {tuple(output_BTD.shape)} to {tuple(hidden_BTD.shape)}")
        if cache is not None:
            cache.advance(*hidden_BTD.shape[:2])
        return output_BTD

    def embed(self, input_ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
        """What enters block 0, [B, T, D] in the client's dtype."""
        seen: list[Tensor] = []

        def capture(call: RemoteCall) -> Tensor:
            seen.append(call.hidden_BTD)
            return call.hidden_BTD

        with torch.no_grad():
            self._with_remote(capture, input_ids_BT, mask_BT, torch.zeros(1, dtype=torch.long, device=self.device))
        return seen[0].detach()

    def loss(
        self, hidden_BTD: Tensor, input_ids_BT: Tensor, mask_BT: Tensor | None, labels_BT: Tensor
    ) -> tuple[Tensor, Tensor, int]:
        """From what left the last block: (summed token loss in fp32, its gradient by `hidden_BTD`, token count).

        Labels are shifted here, as transformers does; -100 is ignored. The gradient has `hidden_BTD`'s dtype.
        """
        leaf_BTD = hidden_BTD.detach().requires_grad_(True)
        with torch.enable_grad():
            total, tokens = self._summed_loss(leaf_BTD, input_ids_BT, mask_BT, labels_BT)
            if tokens == 0:
                return total, torch.zeros_like(hidden_BTD), 0
            (grad_BTD,) = torch.autograd.grad(total, leaf_BTD)
        return total.detach(), grad_BTD, tokens

    def evaluate(
        self, hidden_BTD: Tensor, input_ids_BT: Tensor, mask_BT: Tensor | None, labels_BT: Tensor
    ) -> tuple[Tensor, int]:
        """As `loss`, without the gradient."""
        with torch.no_grad():
            return self._summed_loss(hidden_BTD, input_ids_BT, mask_BT, labels_BT)

    def log_likelihoods(
        self, hidden_BTD: Tensor, input_ids_BT: Tensor, mask_BT: Tensor | None, labels_BT: Tensor
    ) -> Tensor:
        """Of each token with a label, given those before it: [B, T] fp32 in nats, 0 where there is no label."""
        targets_BT = labels_BT[:, 1:].to(self.device)
        found_BT = torch.zeros(labels_BT.shape, dtype=torch.float32, device=self.device)
        kept = _positions(targets_BT)
        if kept.numel():
            with torch.no_grad():
                logits_BKV = self._logits_at(kept, hidden_BTD, input_ids_BT, mask_BT)
                targets_BK = targets_BT[:, kept]
                losses = _cross_entropy(logits_BKV, targets_BK, reduction="none")
            found_BT[:, kept + 1] = -losses.view(targets_BK.shape)
        return found_BT

    def _summed_loss(
        self, hidden_BTD: Tensor, input_ids_BT: Tensor, mask_BT: Tensor | None, labels_BT: Tensor
    ) -> tuple[Tensor, int]:
        targets_BT = labels_BT[:, 1:].to(self.device)
        tokens = int((targets_BT != IGNORED_LABEL).sum())
        if tokens == 0:
            return torch.zeros((), dtype=torch.float32, device=self.device), 0
        kept = _positions(targets_BT)
        logits_BKV = self._logits_at(kept, hidden_BTD, input_ids_BT, mask_BT)
        return _cross_entropy(logits_BKV, targets_BT[:, kept], reduction="sum"), tokens

    def _logits_at(self, kept: Tensor, hidden_BTD: Tensor, input_ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
        logits_BTV = self._with_remote(lambda _: hidden_BTD, input_ids_BT, mask_BT, kept)
        if logits_BTV.shape[1] != kept.numel() or logits_BTV.shape[1] == input_ids_BT.shape[1]:
            logits_BTV = logits_BTV[:, kept]
        return logits_BTV

    def _with_remote(self, remote: Remote, input_ids_BT: Tensor, mask_BT: Tensor | None, kept: Tensor) -> Tensor:
        """One pass with another chain in place -> logits of the positions `kept` (of all, where the family cannot)."""
        model = cast(nn.Module, self)
        options: dict[str, object] = {"use_cache": False}
        if "logits_to_keep" in inspect.signature(inspect.unwrap(type(model).forward)).parameters:
            options["logits_to_keep"] = kept
        before, self.remote = self.remote, remote
        try:
            output = model(input_ids=input_ids_BT.to(self.device), attention_mask=mask_BT, **options)
        finally:
            self.remote = before
        return cast(Tensor, output.logits)

    def _prepare_cache_for_generation(
        self, generation_config: object, model_kwargs: dict[str, object], *args: object, **kwargs: object
    ) -> None:
        """Called by `generate()`: its cache only counts, as the hosts hold the real one."""
        if getattr(generation_config, "use_cache", True) is not False:
            model_kwargs.setdefault("past_key_values", CountingCache())

    def _get_candidate_generator(self, generation_config: GenerationConfig, **kwargs: object) -> CandidateGenerator:
        """Called by assisted generation: prompt lookup guesses as far as pays over a chain, and not past the end."""
        if generation_config.prompt_lookup_num_tokens is not None:
            return AdaptiveLookup(generation_config)
        library = cast(GenerationMixin, super())
        return library._get_candidate_generator(generation_config=generation_config, **kwargs)


def _positions(targets_BT: Tensor) -> Tensor:
    """Where some row has a label: the head is most of the client's work, so it runs only there."""
    return (targets_BT != IGNORED_LABEL).any(dim=0).nonzero().squeeze(1)


def _cross_entropy(logits_BKV: Tensor, targets_BK: Tensor, *, reduction: str) -> Tensor:
    return nn.functional.cross_entropy(
        logits_BKV.float().flatten(0, 1), targets_BK.flatten(), ignore_index=IGNORED_LABEL, reduction=reduction
    )


def cut_to_client(model: nn.Module, num_layers: int) -> None:
    """Drop every layer of `model`, a `ClientModel`, and make the last one remote."""
    _, layers = find_layers(model, num_layers)
    as_tuple = returns_tuple(layers[0])
    for number in range(num_layers - 1):
        layers[number] = Skip(layers[number], as_tuple)
    remote = _RemoteLayer(layers[num_layers - 1], as_tuple)
    object.__setattr__(remote, "client", model)  # not as a submodule: the client owns the layer, not the reverse
    layers[num_layers - 1] = remote
    signature = inspect.signature(inspect.unwrap(type(model).forward))

    def note_arguments(
        module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        arguments = dict(signature.bind_partial(module, *args, **kwargs).arguments)
        arguments.update(cast("dict[str, object]", arguments.pop("kwargs", {})))
        if arguments.get("past_key_values") is None:
            # A session at the hosts is opened only for who asks for one, and can therefore close it.
            kwargs["use_cache"] = arguments.get("use_cache") is True
            if kwargs["use_cache"]:
                arguments["past_key_values"] = kwargs["past_key_values"] = CountingCache()
        module._arguments = arguments  # type: ignore[assignment]
        return args, kwargs

    model.register_forward_pre_hook(note_arguments, with_kwargs=True)
