"""KV caches of decoding sessions under one byte budget. One session a forward pass; batching sessions is not here.

B: rows of a session, T: new tokens, D: hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DummyLayer, DynamicCache, DynamicSlidingWindowLayer

from blocks.adapters import LIVE, use_version, versions
from blocks.errors import BadAdapter, BadSession, BadSpan, CacheFull
from blocks.load import SpanModel
from blocks.spans import Span

MAX_ROWS = 1024  # rows of one session; bounds what a request may claim
MAX_SESSION_NAME = 128


class _RollbackSlidingLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A sliding-window layer that forgets nothing, so that it can roll back as far as full attention can.

    transformers' own drops what is out of the window at the first rollback, and a second, deeper one is then wrong.
    """

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window)
        self.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens."""
        if tokens_to_remove < 0 and self.is_initialized:
            self.keys = cast(Tensor, self.keys)[:, :, :tokens_to_remove]  # type: ignore[has-type]
            self.values = cast(Tensor, self.values)[:, :, :tokens_to_remove]  # type: ignore[has-type]
            self.cumulative_length += tokens_to_remove


@dataclass(kw_only=True, slots=True)
class _Session:
    span: Span
    batch: int
    max_length: int
    version: str
    num_bytes: int
    cache: Cache
    length: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionState:
    """What others may know about an open session. `length` and `max_length` are in positions."""

    span: Span
    batch: int
    length: int
    max_length: int
    version: str
    num_bytes: int


class SessionCaches:
    """The open sessions of a span. Bytes are reserved when a session opens and free again when it closes."""

    def __init__(self, model: SpanModel, budget_bytes: int) -> None:
        """`budget_bytes` bounds the keys and values of all sessions together, at their full length."""
        self._model = model
        self._budget_bytes = budget_bytes
        self._sessions: dict[str, _Session] = {}
        self._layer_bytes = _bytes_per_token(model)

    @property
    def free_bytes(self) -> int:
        """What sessions that are not open yet may still reserve."""
        return self._budget_bytes - sum(session.num_bytes for session in self._sessions.values())

    @property
    def sessions(self) -> tuple[str, ...]:
        """The open sessions, oldest first."""
        return tuple(self._sessions)

    def bytes_per_token(self, span: Span) -> int:
        """What one position of one row takes in the blocks of `span`."""
        return sum(num_bytes for number, num_bytes in self._layer_bytes.items() if number in span)

    def state(self, session: str) -> SessionState:
        """How far a session is.

        Raises:
            BadSession: it is not open.
        """
        found = self._find(session)
        return SessionState(
            span=found.span,
            batch=found.batch,
            length=found.length,
            max_length=found.max_length,
            version=found.version,
            num_bytes=found.num_bytes,
        )

    def open(self, session: str, *, span: Span, batch: int, max_length: int, version: str) -> None:
        """Reserve a session of `batch` rows and up to `max_length` positions, decoding with an adapter version.

        Raises:
            BadSession: the id is taken or malformed, or a number is out of range.
            BadSpan: the blocks are not held here.
            BadAdapter: there is no such version.
            CacheFull: the budget has no room; nothing was allocated.
        """
        if not 0 < len(session) <= MAX_SESSION_NAME or session in self._sessions:
            raise BadSession(f"session '{session[:40]}' is open already or has no valid id; open it under another")
        if not 1 <= batch <= MAX_ROWS:
            raise BadSession(f"a session of {batch} rows was asked for; use 1 to {MAX_ROWS}")
        most = self._model.source.max_positions
        if not 1 <= max_length <= most:
            raise BadSession(f"a session of {max_length} positions was asked for; the model has 1 to {most}")
        if not self._model.span.covers(span):
            raise BadSpan(f"blocks {span} were asked of a model that holds {self._model.span}; ask another peer")
        if self._model.settings is not None and version not in versions(self._model):
            raise BadAdapter(f"there is no adapter version '{version[:80]}' here; fetch it or use a newer one")
        num_bytes = batch * max_length * self.bytes_per_token(span)
        if num_bytes > self.free_bytes:
            raise CacheFull(f"a session of {num_bytes} bytes does not fit in {self.free_bytes} free; try another host")
        self._sessions[session] = _Session(
            span=span,
            batch=batch,
            max_length=max_length,
            version=version,
            num_bytes=num_bytes,
            cache=_new_cache(self._model, span),
        )

    def step(
        self,
        session: str,
        hidden_BTD: Tensor,
        *,
        position: int,
        mask_BT: Tensor | None,
        position_ids_BT: Tensor | None,
        rows: tuple[int, ...] | None = None,
    ) -> Tensor:
        """The next T tokens of a session, from `position` on -> [B, T, D] in the input's dtype.

        A `position` before the session's length rolls back first. `rows` says which old row each row goes on from.
        `mask_BT` covers everything up to the last new token. A request that is refused changes nothing; one that fails
        while it is computed closes the session, as its cache may be half written.

        Raises:
            BadSession: the session is not open, or the request does not fit it.
        """
        found = self._find(session)
        length = _check_step(found, self._model.source.hidden_size, hidden_BTD, position, rows)
        _check_masks(found.batch, length, hidden_BTD.shape[1], mask_BT, position_ids_BT)
        done = False
        try:
            self._move(found, position, rows)
            if self._model.settings is not None:
                use_version(self._model, found.version)
            with torch.no_grad():
                output_BTD = self._model.forward(
                    hidden_BTD, span=found.span, mask_BT=mask_BT, position_ids_BT=position_ids_BT, cache=found.cache
                )
            found.length = length
            done = True
        finally:
            if not done:
                self.close(session)
        return output_BTD.to(hidden_BTD.dtype)

    def close(self, session: str) -> None:
        """Forget a session and free its bytes; one that is not open is fine, as both ends may close."""
        self._sessions.pop(session, None)

    def _find(self, session: str) -> _Session:
        found = self._sessions.get(session)
        if found is None:
            raise BadSession(f"session '{session[:40]}' is not open here; open it and send its inputs again")
        return found

    def _move(self, found: _Session, position: int, rows: tuple[int, ...] | None) -> None:
        """Roll back and reorder, before new tokens come."""
        if position == 0 and found.length > 0:
            found.cache = _new_cache(self._model, found.span)
        elif position < found.length:
            found.cache.crop(position - found.length)
        if rows is not None and position > 0 and rows != tuple(range(found.batch)):
            found.cache.reorder_cache(torch.tensor(rows, dtype=torch.long, device=self._model.device))


def _check_step(
    found: _Session, hidden_size: int, hidden_BTD: Tensor, position: int, rows: tuple[int, ...] | None
) -> int:
    """The session's length after the step, if the step fits."""
    if hidden_BTD.dim() != 3 or hidden_BTD.shape[0] != found.batch or hidden_BTD.shape[2] != hidden_size:
        raise BadSession(f"the input is {tuple(hidden_BTD.shape)}; the session takes ({found.batch}, T, {hidden_size})")
    if not 0 <= position <= found.length:
        raise BadSession(f"position {position} is not in 0 to {found.length}; send the missing inputs first")
    length = position + int(hidden_BTD.shape[1])
    if hidden_BTD.shape[1] < 1 or length > found.max_length:
        raise BadSession(
            f"the session ends at {found.max_length} positions and was asked for {length}; open a longer one"
        )
    if rows is not None and (len(rows) != found.batch or not all(0 <= row < found.batch for row in rows)):
        raise BadSession(f"the row order does not fit a session of {found.batch} rows; send one old row for each row")
    return length


def _check_masks(batch: int, length: int, tokens: int, mask_BT: Tensor | None, position_ids_BT: Tensor | None) -> None:
    if mask_BT is not None and tuple(mask_BT.shape) != (batch, length):
        raise BadSession(f"the mask is {tuple(mask_BT.shape)}; it must be {(batch, length)}, old positions included")
    if position_ids_BT is not None and tuple(position_ids_BT.shape) not in {(batch, tokens), (1, tokens)}:
        raise BadSession(f"the position ids are {tuple(position_ids_BT.shape)}; they must be {(batch, tokens)}")


def _new_cache(model: SpanModel, span: Span) -> Cache:
    """The family's own kinds of layers for the blocks of `span`, nothing for the others."""
    cache = cast(Cache, DynamicCache(config=model.config))
    for number, layer in enumerate(cache.layers):
        if number not in span:
            cache.layers[number] = DummyLayer()
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[number] = _RollbackSlidingLayer(layer.sliding_window)
    return cache


def _bytes_per_token(model: SpanModel) -> dict[int, int]:
    """By block, measured on one token, as families differ in what they cache."""
    cache = _new_cache(model, model.span)
    probe_BTD = torch.zeros(1, 1, model.source.hidden_size, device=model.device)
    if model.settings is not None:
        use_version(model, LIVE)
    with torch.no_grad():
        model.forward(probe_BTD, span=model.span, cache=cache)
    return {
        number: sum(
            tensor.numel() * tensor.element_size()
            for tensor in (cache.layers[number].keys, cache.layers[number].values)
            if tensor is not None
        )
        for number in model.span.blocks()
    }
