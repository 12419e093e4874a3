"""Several texts of one process on one copy of the client's ends, whose heads are computed together.

The head reads all of its weights for each token, as much as a fifth of a small model; for the tokens of several texts
it reads them once. D: hidden size, V: vocabulary.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from blocks.client import ClientModel

MAX_TOGETHER = 64  # tokens; a pass of more is bound by arithmetic, and gains nothing from company


@dataclass(eq=False, slots=True)
class _Call:
    hidden_ND: Tensor
    logits_NV: Tensor | None = None
    error: Exception | None = None


class SharedHead(nn.Module):
    """A head that several threads call. Whoever comes first computes; those who come meanwhile share the next pass.

    That is flat combining (Hendler et al., 2010): nobody waits for company, and nobody computes while another does.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self._computing, self._lock = threading.Lock(), threading.Lock()
        self._waiting: list[_Call] = []
        self.passes = 0

    @property
    def weight(self) -> Tensor:
        """Of the head [V, D], for those who look."""
        return cast(Tensor, self.head.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of `hidden` [..., D]; alone where a gradient is wanted or there is much to compute."""
        hidden_ND = hidden.reshape(-1, hidden.shape[-1])
        if torch.is_grad_enabled() or hidden_ND.shape[0] > MAX_TOGETHER:
            return cast(Tensor, self.head(hidden))
        call = _Call(hidden_ND)
        with self._lock:
            self._waiting.append(call)
        with self._computing:
            if call.logits_NV is None and call.error is None:
                self._compute()
        if call.error is not None:
            raise call.error
        assert call.logits_NV is not None
        return call.logits_NV.reshape(*hidden.shape[:-1], -1)

    def __deepcopy__(self, memo: dict[int, object]) -> SharedHead:
        """Copies of a model share it: that is what it is for."""
        return self

    def _compute(self) -> None:
        """Logits for all who wait."""
        with self._lock:
            calls, self._waiting = self._waiting, []
        try:
            logits = self.head(torch.cat([call.hidden_ND for call in calls]))
        except Exception as error:  # each of those who wait meets it
            for call in calls:
                call.error = error
            return
        self.passes += 1
        for call, part in zip(calls, logits.split([len(call.hidden_ND) for call in calls]), strict=True):
            call.logits_NV = part


class SharedClient:
    """Hands out clients that share their weights and their head. Use from any thread."""

    def __init__(self, load: Callable[[], ClientModel]) -> None:
        self._load = load
        self._lock = threading.Lock()
        self._first: ClientModel | None = None

    def another(self) -> ClientModel:
        """A client without a chain; the first one loads the weights.

        Raises:
            BlockError: as `load` does.
        """
        with self._lock:
            if self._first is None:
                self._first = self._load()
                _share_head(cast(nn.Module, self._first))
            first = cast(nn.Module, self._first)
            tensors = [*first.parameters(), *first.buffers()]
            return cast(ClientModel, copy.deepcopy(first, {id(tensor): tensor for tensor in tensors}))


def _share_head(model: nn.Module) -> None:
    """Put a shared head around the model's own."""
    head = cast("nn.Module | None", model.get_output_embeddings())  # type: ignore[operator]
    if head is not None:
        model.set_output_embeddings(SharedHead(head))  # type: ignore[operator]
