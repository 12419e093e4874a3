"""What goes through a loop's model, counted in its forward passes: work in training, loss in evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from swarm.training.evaluation_sums import Sums

_NO_LABEL = -100


class Counter:
    """Counts what a model is trained on: rows and tokens with a label, in forward passes that keep a graph.

    Tokens are summed where the labels are, and read once a step.
    """

    def __init__(self, module: nn.Module) -> None:
        self._rows = 0
        self._tokens: list[torch.Tensor] = []
        self._handle = module.register_forward_pre_hook(self._see, with_kwargs=True)

    def take(self) -> tuple[int, int]:
        """Rows and tokens since the last call."""
        found = self._rows, sum(int(count) for count in self._tokens)
        self._rows, self._tokens = 0, []
        return found

    def close(self) -> None:
        """Count no more."""
        self._handle.remove()

    def _see(self, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        labels, ids = kwargs.get("labels"), kwargs.get("input_ids", args[0] if args else None)
        rows = next((each for each in (labels, ids) if isinstance(each, torch.Tensor)), None)
        if rows is None or rows.dim() == 0:
            return
        self._rows += rows.shape[0]
        if rows is labels:
            rows = (rows[..., 1:] if rows.dim() > 1 else rows) != _NO_LABEL
            self._tokens.append(rows.sum())
        else:
            self._tokens.append(torch.tensor(rows.numel()))


class HeldOutCounter:
    """Sums the loss over tokens with a label in forward passes of a model in evaluation, from its logits: the mean that
    a model returns may be of anything, smoothed or with an auxiliary loss.

    Legend: B rows, T positions, V vocabulary.
    """

    def __init__(self, module: nn.Module) -> None:
        self._losses_B: list[torch.Tensor] = []
        self._tokens: list[torch.Tensor] = []
        self._passes = 0
        self._is_clear = True
        self._handle = module.register_forward_hook(self._see, with_kwargs=True)

    def take(self, passes: int | None = None) -> Sums | None:
        """The sums since the last call. None where there are none, where some pass had labels and no logits for them,
        or where the passes with labels were not as many as said.
        """
        is_whole = self._is_clear and passes in (None, self._passes)
        loss = math.fsum(value for losses_B in self._losses_B for value in losses_B.tolist())
        tokens = sum(int(count) for count in self._tokens)
        self._losses_B, self._tokens, self._passes, self._is_clear = [], [], 0, True
        return Sums(loss=loss, tokens=tokens) if is_whole and tokens else None

    def close(self) -> None:
        """Count no more."""
        self._handle.remove()

    def _see(self, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], output: object) -> None:
        labels_BT = kwargs.get("labels")
        if module.training or not isinstance(labels_BT, torch.Tensor):
            return
        self._passes += 1
        logits_BTV = getattr(output, "logits", None)
        if not isinstance(logits_BTV, torch.Tensor) or logits_BTV.dim() != 3 or logits_BTV.shape[:2] != labels_BT.shape:
            self._is_clear = False
            return
        with torch.no_grad():
            self._losses_B.append(_row_losses(logits_BTV, labels_BT.to(logits_BTV.device)))
            self._tokens.append((labels_BT[:, 1:] != _NO_LABEL).sum())


def _row_losses(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Summed cross entropy of each row, in nats; row by row, so that only one is held in fp32 at a time."""
    losses = [
        nn.functional.cross_entropy(logits_TV[:-1].float(), labels_T[1:], ignore_index=_NO_LABEL, reduction="sum")
        for logits_TV, labels_T in zip(logits_BTV, labels_BT, strict=True)
    ]
    return torch.stack(losses)
