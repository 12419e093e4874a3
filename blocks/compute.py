"""Forward and backward through a span with its LoRA. Knows nothing of peers, steps or optimizers.

B: batch, T: tokens, D: hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from blocks.adapters import LIVE, LoraSettings, attach, block_of, live_dropouts, parameters_by_unit, use_version
from blocks.errors import BadSession
from blocks.load import SpanModel
from blocks.rng import forked_rng
from blocks.spans import Span, UnitId

UnitGradients = dict[UnitId, dict[str, Tensor]]
"""By unit and tensor name: fp32 gradients on the model's device."""

_PROBE_TOKENS = 8


@dataclass(kw_only=True, slots=True)
class Stash:
    """What the backward pass of one microbatch needs: its input, and its output with the graph if that was kept."""

    input_BTD: Tensor
    output_BTD: Tensor | None
    span: Span
    mask_BT: Tensor | None
    seed: int
    num_bytes: int


class SpanCompute:
    """A span with its LoRA, ready to compute. One pass at a time; the caller keeps it on one thread."""

    def __init__(self, model: SpanModel, settings: LoraSettings) -> None:
        """Attaches the LoRA.

        Raises:
            BadAdapter: the settings do not fit the model.
        """
        attach(model, settings)
        self.model = model
        self.settings = settings
        self._dropouts = live_dropouts(model) if settings.dropout > 0 else []
        self._graph_bytes_per_token: int | None = None

    def forward_train(
        self, hidden_BTD: Tensor, *, span: Span, mask_BT: Tensor | None, seed: int, keep_graph: bool
    ) -> tuple[Tensor, Stash]:
        """Through `span` with the live LoRA -> (output [B, T, D] in the input's dtype, what backward needs).

        `seed` decides the dropout: the same call with the same seed gives the same output, here or at another host.
        Without `keep_graph` only the input is kept, and backward computes the rest again.

        Raises:
            BadSpan: `span` is not held here.
        """
        input_BTD = hidden_BTD.detach()
        stash = Stash(input_BTD=input_BTD, output_BTD=None, span=span, mask_BT=mask_BT, seed=seed, num_bytes=0)
        stash.num_bytes = self._bytes(input_BTD)
        if keep_graph:
            stash.input_BTD = input_BTD.requires_grad_(True)
            stash.output_BTD = self._run(stash)
            blocks = len(span) / len(self.model.span)
            stash.num_bytes += int(self.graph_bytes_per_token() * blocks * input_BTD.shape[0] * input_BTD.shape[1])
            return stash.output_BTD.detach(), stash
        with torch.no_grad():
            return self._run(stash), stash

    def backward(self, stash: Stash, grad_BTD: Tensor) -> tuple[Tensor, UnitGradients]:
        """The gradients by the span's input, in its dtype, and by every live parameter of the span, in fp32.

        The stash is spent afterwards. Parameters that the pass did not touch (experts without tokens) get zeros.

        Raises:
            BadSession: the gradient's shape is not the output's.
        """
        if grad_BTD.shape != stash.input_BTD.shape:
            raise BadSession(f"the gradient is {tuple(grad_BTD.shape)}; the output was {tuple(stash.input_BTD.shape)}")
        if stash.output_BTD is None:
            stash.input_BTD = stash.input_BTD.detach().requires_grad_(True)
            stash.output_BTD = self._run(stash)
        named = [
            (unit, name, parameter)
            for unit, parameters in parameters_by_unit(self.model).items()
            if block_of(unit) in stash.span
            for name, parameter in parameters.items()
        ]
        output_BTD = stash.output_BTD
        # The gradient of this sum by the output is grad_BTD to the bit. Handing grad_BTD to torch.autograd.grad instead
        # makes torch import sympy, half a second before a host is online, to compare two shapes.
        weighted = (output_BTD * grad_BTD.to(device=output_BTD.device, dtype=output_BTD.dtype)).sum()
        grad_input_BTD, *gradients = torch.autograd.grad(
            weighted,
            [stash.input_BTD, *(parameter for _, _, parameter in named)],
            allow_unused=True,
            materialize_grads=True,
        )
        stash.output_BTD = None
        by_unit: UnitGradients = {}
        for (unit, name, _), gradient in zip(named, gradients, strict=True):
            by_unit.setdefault(unit, {})[name] = gradient.float()
        return grad_input_BTD, by_unit

    def forward_eval(self, hidden_BTD: Tensor, *, span: Span, mask_BT: Tensor | None, version: str) -> Tensor:
        """Through `span` with a version of the LoRA, without dropout or gradients -> [B, T, D] in the input's dtype.

        Raises:
            BadSpan: `span` is not held here.
            BadAdapter: there is no such version.
        """
        use_version(self.model, version)
        with torch.no_grad():
            return self.model.forward(hidden_BTD, span=span, mask_BT=mask_BT).to(hidden_BTD.dtype)

    def graph_bytes_per_token(self) -> int:
        """About how many bytes one token's kept graph takes in the whole span; measured once, on a short pass."""
        if self._graph_bytes_per_token is None:
            self._graph_bytes_per_token = self._measure_graph()
        return self._graph_bytes_per_token

    def _run(self, stash: Stash) -> Tensor:
        use_version(self.model, LIVE)
        with self._dropout(stash.seed, stash.span):
            output_BTD = self.model.forward(stash.input_BTD, span=stash.span, mask_BT=stash.mask_BT)
        return output_BTD.to(stash.input_BTD.dtype)

    @contextmanager
    def _dropout(self, seed: int, span: Span) -> Iterator[None]:
        """Dropout on, drawn from `seed` and nothing else, so that nothing has to be remembered to draw it again."""
        if not self._dropouts:
            yield
            return
        # The span goes into the seed, else the hosts of a chain would all drop the same positions.
        mixed = hashlib.sha256(f"{seed}:{span}".encode()).digest()
        with forked_rng(int.from_bytes(mixed[:8], "little", signed=True), self.model.device):
            for dropout in self._dropouts:
                dropout.train()
            try:
                yield
            finally:
                for dropout in self._dropouts:
                    dropout.eval()

    def _bytes(self, tensor: Tensor) -> int:
        return tensor.numel() * tensor.element_size()

    def _measure_graph(self) -> int:
        frozen = {parameter.data_ptr() for parameter in self.model.module.parameters()}
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in frozen:
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor.detach()  # the tensor itself would keep its own graph alive

        size = self.model.source.hidden_size
        probe_BTD = torch.zeros(1, _PROBE_TOKENS, size, device=self.model.device, requires_grad=True)
        use_version(self.model, LIVE)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.enable_grad():
            output_BTD = self.model.forward(probe_BTD, span=self.model.span)
        total = sum(seen.values())
        del output_BTD
        return total // _PROBE_TOKENS
