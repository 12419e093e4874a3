"""What activations must look like before they touch the model: checked once, where they come in from the wire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from peers.errors import BadMessage

_ACTIVATIONS = (torch.float32, torch.bfloat16, torch.float16)
_WHOLE = (torch.int64, torch.int32, torch.uint8, torch.bool)


@dataclass(frozen=True, kw_only=True, slots=True)
class Edge:
    """The bounds of one model on one host: width of activations, longest text, most tokens in one pass."""

    hidden_size: int
    max_positions: int
    max_tokens: int = 65_536

    def __post_init__(self) -> None:
        if min(self.hidden_size, self.max_positions, self.max_tokens) < 1:
            raise ValueError("the bounds of an edge must be positive")

    def hidden(self, tensors: Sequence[torch.Tensor], *, most: int) -> torch.Tensor:
        """The activations [B, T, D] that come first among 1 to `most` tensors.

        Raises:
            BadMessage: their number, shape or dtype is not what the model takes.
        """
        if not 1 <= len(tensors) <= most:
            raise BadMessage(f"{len(tensors)} tensors came, 1 to {most} are expected")
        hidden = tensors[0]
        if hidden.dim() != 3 or hidden.shape[2] != self.hidden_size or hidden.dtype not in _ACTIVATIONS:
            raise BadMessage(
                f"activations of shape {tuple(hidden.shape)}, {hidden.dtype} came; "
                f"[batch, tokens, {self.hidden_size}] in a float dtype are expected"
            )
        batch, tokens = hidden.shape[:2]
        if not 0 < batch * tokens <= self.max_tokens or tokens > self.max_positions:
            raise BadMessage(
                f"{batch} x {tokens} tokens came; at most {self.max_tokens} in all and {self.max_positions} in a row "
                "are taken, use smaller microbatches"
            )
        return hidden

    def mask(self, mask: torch.Tensor, batch: int, length: int) -> torch.Tensor:
        """A mask [batch, length], 1 where there is a token, as int64.

        Raises:
            BadMessage: wrong shape, dtype or values.
        """
        if mask.dtype not in _WHOLE or tuple(mask.shape) != (batch, length):
            raise BadMessage(f"a mask of shape {tuple(mask.shape)}, {mask.dtype} came; [{batch}, {length}] is expected")
        whole = mask.to(torch.int64)
        if int(whole.min()) < 0 or int(whole.max()) > 1:
            raise BadMessage("a mask with values other than 0 and 1 was refused")
        return whole

    def positions(self, positions: torch.Tensor, batch: int, length: int) -> torch.Tensor:
        """Position ids [batch, length] below the model's longest text, as int64.

        Raises:
            BadMessage: wrong shape, dtype or values.
        """
        if positions.dtype not in _WHOLE or tuple(positions.shape) != (batch, length):
            raise BadMessage(f"position ids of shape {tuple(positions.shape)} came; [{batch}, {length}] is expected")
        whole = positions.to(torch.int64)
        if int(whole.min()) < 0 or int(whole.max()) >= self.max_positions:
            raise BadMessage(f"position ids outside 0 to {self.max_positions - 1} were refused")
        return whole
