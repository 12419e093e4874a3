"""Computes steps of several sessions, together where the family allows it. Requests were checked by cache.py."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from blocks.adapters import use_version
from blocks.decoding.passes import PassInput, run_together
from blocks.decoding.sessions import Session, StepRequest
from blocks.decoding.slot_view import Rows
from blocks.decoding.slots import SlotStore, capacity_for
from blocks.decoding.solo_cache import solo_cache
from blocks.errors import BadSession
from blocks.load import SpanModel

logger = logging.getLogger(__name__)

_FIRST_CAPACITY = 64  # a session that starts smaller grows soon, and those of one size share passes without copying


class SessionPasses:
    """The passes of a span's sessions. `store` is None where a family's sessions cannot share passes."""

    def __init__(self, model: SpanModel, store: SlotStore | None) -> None:
        self._model, self._store = model, store

    def capacity(self, session: Session, length: int) -> int:
        """The capacity of the rows that a session needs for `length` positions."""
        held = 0 if session.placement is None else session.placement.pool.capacity
        return max(capacity_for(length), held, min(_FIRST_CAPACITY, session.promised))

    def begin(self, session: Session, request: StepRequest, capacity: int) -> None:
        """Roll back, reorder the rows, and make room."""
        position, rows = request.position, request.rows
        reorder = rows is not None and position > 0 and rows != tuple(range(session.batch))
        if self._store is None:
            if session.cache is None or position == 0:
                session.cache = solo_cache(self._model, session.span)
            elif position < session.length:
                session.cache.crop(position - session.length)
            if reorder:
                session.cache.reorder_cache(torch.tensor(rows, dtype=torch.long, device=self._model.device))
        elif session.placement is None:
            session.placement = self._store.place(session.span, session.batch, capacity)
        else:
            if session.placement.pool.capacity < capacity:
                self._store.move(session.placement, capacity, position)
            if reorder and rows is not None:
                session.placement.pool.reorder(session.placement, rows, position)
        session.length = position

    def lie_together(self, sessions: Sequence[Session], free_bytes: int) -> None:
        """Give all rows of the longest one's capacity if `free_bytes` are enough, to be read without copying."""
        if self._store is None:
            return
        placements = [session.placement for session in sessions if session.placement is not None]
        capacity = max(placement.pool.capacity for placement in placements)
        more = sum(session.num_bytes(capacity) - session.num_bytes() for session in sessions)
        if more > free_bytes:
            return
        try:
            for session, placement in zip(sessions, placements, strict=True):
                if placement.pool.capacity != capacity:
                    self._store.move(placement, capacity, session.length)
        except (RuntimeError, MemoryError) as error:  # without it the pass copies what it reads, and that is all
            logger.warning("no memory to put sessions side by side error=%s", error)

    def run(self, steps: Sequence[tuple[Session, StepRequest]]) -> list[Tensor | Exception]:
        """The output of each step, all of one span, or what went wrong with it.

        If a pass of several fails each is tried alone, so that only the one to blame is hurt.
        """
        if self._store is not None and len(steps) > 1:
            try:
                return [_finite(output) for output in self._run_slots(self._store, steps)]
            except Exception as error:  # whose fault it was shows when each is alone, and is raised there
                logger.warning("pass of %d sessions failed, each is tried alone error=%s", len(steps), error)
        return [self._run_alone(session, request) for session, request in steps]

    def _run_alone(self, session: Session, request: StepRequest) -> Tensor | Exception:
        try:
            if self._store is not None:
                return _finite(self._run_slots(self._store, [(session, request)])[0])
            return _finite(self._run_solo(session, request))
        except Exception as error:  # handed to the one who asked
            return error

    def _run_slots(self, store: SlotStore, steps: Sequence[tuple[Session, StepRequest]]) -> list[Tensor]:
        inputs = []
        for session, request in steps:
            assert session.placement is not None
            tokens = request.hidden_BTD.shape[1]
            inputs.append(
                PassInput(
                    rows=Rows(placement=session.placement, position=request.position, tokens=tokens),
                    hidden_BTD=request.hidden_BTD,
                    mask_BK=request.mask_BT,
                    position_ids_BT=request.position_ids_BT,
                    version=session.version,
                )
            )
        outputs = run_together(self._model, store, steps[0][0].span, inputs)
        return [output.to(request.hidden_BTD.dtype) for output, (_, request) in zip(outputs, steps, strict=True)]

    def _run_solo(self, session: Session, request: StepRequest) -> Tensor:
        if self._model.settings is not None:
            use_version(self._model, session.version)
        with torch.no_grad():
            output_BTD = self._model.forward(
                request.hidden_BTD,
                span=session.span,
                mask_BT=request.mask_BT,
                position_ids_BT=request.position_ids_BT,
                cache=session.cache,
            )
        return output_BTD.to(request.hidden_BTD.dtype)


def _finite(output_BTD: Tensor) -> Tensor | Exception:
    """Keys and values that are not finite would reach whoever reads the rows next, so their session must end."""
    if bool(torch.isfinite(output_BTD).all()):
        return output_BTD
    return BadSession("the blocks gave values that are not finite, and the session is closed; open it again")
