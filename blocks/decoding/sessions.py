"""What a decoding session is, and which requests fit it. B: rows of a session, T: new tokens, D: hidden size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from blocks.decoding.slots import Placement
from blocks.errors import BadSession
from blocks.spans import Span

MAX_ROWS = 1024  # rows of one session; bounds what a request may claim
MAX_SESSION_NAME = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRequest:
    """The next T tokens of a session, from `position` on; see `SessionCaches.step`."""

    session: str
    hidden_BTD: Tensor
    position: int
    mask_BT: Tensor | None = None
    position_ids_BT: Tensor | None = None
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionState:
    """What others may know about an open session. `length` and `max_length` are in positions."""

    span: Span
    batch: int
    length: int
    max_length: int
    version: str
    num_bytes: int


@dataclass(kw_only=True, slots=True)
class Session:
    """One open session. `length` counts what is cached of each row; the contents behind it do not matter."""

    span: Span
    batch: int
    max_length: int
    version: str
    row_bytes: int  # of one position of one row
    promised: int  # positions of a row that were reserved
    length: int = 0
    placement: Placement | None = None
    cache: Cache | None = None

    def num_bytes(self, capacity: int = 0) -> int:
        """What the session counts for, or would with rows of `capacity`."""
        held = 0 if self.placement is None else self.placement.pool.capacity
        return self.batch * max(self.promised, held, capacity) * self.row_bytes

    def state(self) -> SessionState:
        """What others may know."""
        return SessionState(
            span=self.span,
            batch=self.batch,
            length=self.length,
            max_length=self.max_length,
            version=self.version,
            num_bytes=self.num_bytes(),
        )


def check_opening(session: str, batch: int, max_length: int, most: int) -> None:
    """Refuse what no session may be; `most` positions are what the model has.

    Raises:
        BadSession: the id is malformed, or a number is out of range.
    """
    if not 0 < len(session) <= MAX_SESSION_NAME:
        raise BadSession(f"session '{session[:40]}' has no valid id; use 1 to {MAX_SESSION_NAME} characters")
    if not 1 <= batch <= MAX_ROWS:
        raise BadSession(f"a session of {batch} rows was asked for; use 1 to {MAX_ROWS}")
    if not 1 <= max_length <= most:
        raise BadSession(f"a session of {max_length} positions was asked for; the model has 1 to {most}")


def check_request(found: Session, request: StepRequest, hidden_size: int) -> int:
    """The session's length after the step.

    Raises:
        BadSession: the step does not fit the session.
    """
    hidden_BTD, position = request.hidden_BTD, request.position
    if hidden_BTD.dim() != 3 or hidden_BTD.shape[0] != found.batch or hidden_BTD.shape[2] != hidden_size:
        raise BadSession(f"the input is {tuple(hidden_BTD.shape)}; the session takes ({found.batch}, T, {hidden_size})")
    if not 0 <= position <= found.length:
        raise BadSession(f"position {position} is not in 0 to {found.length}; send the missing inputs first")
    tokens = int(hidden_BTD.shape[1])
    length = position + tokens
    if tokens < 1 or length > found.max_length:
        raise BadSession(
            f"the session ends at {found.max_length} positions and was asked for {length}; open a longer one"
        )
    rows = request.rows
    if rows is not None and (len(rows) != found.batch or not all(0 <= row < found.batch for row in rows)):
        raise BadSession(f"the row order does not fit a session of {found.batch} rows; send one old row for each row")
    mask_BT, positions_BT = request.mask_BT, request.position_ids_BT
    if mask_BT is not None and tuple(mask_BT.shape) != (found.batch, length):
        raise BadSession(f"the mask is {tuple(mask_BT.shape)}; it must be {(found.batch, length)}, old ones included")
    if positions_BT is not None and tuple(positions_BT.shape) not in {(found.batch, tokens), (1, tokens)}:
        raise BadSession(f"the position ids are {tuple(positions_BT.shape)}; they must be {(found.batch, tokens)}")
    if not bool(torch.isfinite(hidden_BTD).all()):
        raise BadSession("the input has values that are not finite; compute it again")
    return length
