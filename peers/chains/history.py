"""What went into a hop, or came out of it, in one text: kept so that a host that dies can be replaced by one prefill.

The client keeps what it sends to the first host; each host keeps what it sends to the next. B: rows, T: new tokens,
S: positions so far, D: hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from peers.streams.messages import Step


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInput:
    """What enters a hop: hidden [B, T, D] at `position`, the mask [B, position + T] and positions [B, T] where known.

    `rows` picks and reorders the batch first. The first `replay` tokens are not new: they only rebuild the caches of
    the next `depth` hops, the others have them.
    """

    hidden_BTD: torch.Tensor
    position: int
    mask_BS: torch.Tensor | None = None
    positions_BT: torch.Tensor | None = None
    rows: tuple[int, ...] | None = None
    replay: int = 0
    depth: int = 0

    @property
    def end(self) -> int:
        """Positions after this step."""
        return self.position + int(self.hidden_BTD.shape[1])

    def here(self) -> StepInput:
        """What this hop computes: one whose cache is rebuilt gets rows that are in their new order already."""
        return replace(self, rows=None) if self.depth else self

    def out(self, output_BTD: torch.Tensor) -> StepInput:
        """The same step as it leaves this hop, with its output [B, T, D]."""
        return replace(self, hidden_BTD=output_BTD)

    def new_part(self) -> StepInput:
        """The step without what is replayed."""
        positions_BT, skip = self.positions_BT, self.replay
        return replace(
            self,
            hidden_BTD=self.hidden_BTD[:, skip:],
            position=self.position + skip,
            positions_BT=None if positions_BT is None else positions_BT[:, skip:],
            replay=0,
            depth=0,
        )

    def passed_on(self) -> StepInput:
        """What the next hop gets of it."""
        return replace(self, depth=self.depth - 1) if self.depth > 1 else self.new_part()


class History:
    """All that passed one point of a chain in a text, in the order and length that it has now."""

    def __init__(self) -> None:
        self._hidden: list[torch.Tensor] = []
        self._positions: list[torch.Tensor] = []
        self._last: StepInput | None = None
        self.length = 0

    @property
    def num_bytes(self) -> int:
        """What is kept of hidden states."""
        if self._last is None:
            return 0
        rows, _, width = self._last.hidden_BTD.shape
        return self.length * rows * width * self._last.hidden_BTD.element_size()

    @property
    def last_shape(self) -> torch.Size:
        """Of the newest step's hidden states, [B, T, D]."""
        return torch.Size() if self._last is None else self._last.hidden_BTD.shape

    def add(self, step: StepInput) -> None:
        """Roll back to the step's position, put the rows in its order, and append it."""
        if step.rows is not None and self._hidden and not step.depth:
            order = torch.tensor(step.rows)
            self._hidden = [torch.cat(self._hidden, dim=1)[order]]
            self._positions = [torch.cat(self._positions, dim=1)[order]] if self._positions else []
        if step.position < self.length:
            self._hidden = _first(self._hidden, step.position)
            self._positions = _first(self._positions, step.position)
        self._hidden.append(step.hidden_BTD)
        if step.positions_BT is not None:
            self._positions.append(step.positions_BT)
        self.length = step.end
        self._last = step.new_part()

    def again(self, depth: int) -> StepInput | None:
        """The last step for a chain whose next `depth` hops are new: everything before it comes along.

        None where a step has been added whose predecessors are not here.
        """
        last = self._last
        if last is None or sum(int(hidden.shape[1]) for hidden in self._hidden) != self.length:
            return None
        if not depth or not last.position:
            return last
        return replace(
            last,
            hidden_BTD=torch.cat(self._hidden, dim=1),
            position=0,
            positions_BT=torch.cat(self._positions, dim=1) if self._positions else None,
            replay=last.position,
            depth=depth,
        )


def _first(pieces: list[torch.Tensor], length: int) -> list[torch.Tensor]:
    return [torch.cat(pieces, dim=1)[:, :length]] if pieces and length else []


def as_message(session: str, number: int, step: StepInput) -> tuple[Step, tuple[torch.Tensor, ...]]:
    """A step as it travels."""
    message = Step(
        session=session,
        number=number,
        position=step.position,
        has_mask=step.mask_BS is not None,
        has_positions=step.positions_BT is not None,
        rows=step.rows,
        replay=step.replay,
        depth=step.depth,
    )
    tensors = [step.hidden_BTD]
    if step.mask_BS is not None:
        tensors.append(step.mask_BS.to(torch.uint8))
    if step.positions_BT is not None:
        tensors.append(step.positions_BT.to(torch.int32))
    return message, tuple(tensors)
