"""KV caches of decoding sessions under one byte budget, and the passes that extend them, many sessions at a time.

Which sessions go into a pass is decided here only as far as it must be: those that fit together at all. What is worth
computing together, and when, is for batching.py and batched.py. B: rows of a session, T: new tokens, D: hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from torch import Tensor

from blocks.adapters import versions
from blocks.decoding.passes import why_not_together
from blocks.decoding.session_passes import SessionPasses
from blocks.decoding.sessions import Session, SessionState, StepRequest, check_opening, check_request
from blocks.decoding.slots import SlotStore, capacity_for
from blocks.decoding.solo_cache import measure_layers
from blocks.errors import BadAdapter, BadSession, BadSpan, CacheFull
from blocks.load import SpanModel
from blocks.spans import Span

logger = logging.getLogger(__name__)

_ROOM_FOR_COMPANY = 0.5  # of the budget stays free when sessions get longer rows only to lie beside others


def most_bytes(caches: SessionCaches, span: Span, *, batch: int, max_length: int) -> int:
    """What a session takes when it has grown to its longest."""
    return batch * capacity_for(max_length) * caches.bytes_per_token(span)


class SessionCaches:
    """The open sessions of a span. Bytes are reserved when a session opens and free again when it closes.

    Rows are allocated as sessions grow, in capacities of powers of two, never more than `budget_bytes` but for the
    moment in which a session moves.
    """

    def __init__(self, model: SpanModel, budget_bytes: int) -> None:
        """`budget_bytes` bounds the keys and values of all sessions together."""
        self._model = model
        self.budget_bytes = budget_bytes
        self._sessions: dict[str, Session] = {}
        self._layer_bytes, shapes = measure_layers(model)
        self.alone_because = why_not_together(model, shapes)
        if self.alone_because is not None:
            logger.info("sessions are computed one by one span=%s reason=%s", model.span, self.alone_because)
        self._store = SlotStore(shapes or {}, budget_bytes, model.device)
        self._passes = SessionPasses(model, self._store if self.alone_because is None else None)

    @property
    def free_bytes(self) -> int:
        """What sessions that are not open yet may still reserve."""
        return self.budget_bytes - sum(session.num_bytes() for session in self._sessions.values())

    @property
    def allocated_bytes(self) -> int:
        """What keys and values of sessions take now; 0 where sessions are computed alone, as the library allocates."""
        return self._store.num_bytes

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
        return self._find(session).state()

    def open(
        self,
        session: str,
        *,
        span: Span,
        batch: int,
        max_length: int,
        version: str,
        expected_length: int | None = None,
    ) -> None:
        """Reserve a session of `batch` rows and up to `max_length` positions, decoding with an adapter version.

        With `expected_length` only so many positions are reserved; growing further succeeds while there is room.

        Raises:
            BadSession: the id is taken or malformed, or a number is out of range.
            BadSpan: the blocks are not held here.
            BadAdapter: there is no such version.
            CacheFull: the budget has no room; nothing was allocated.
        """
        if session in self._sessions:
            raise BadSession(f"session '{session[:40]}' is open already; open it under another id")
        check_opening(session, batch, max_length, self._model.source.max_positions)
        if not self._model.span.covers(span):
            raise BadSpan(f"blocks {span} were asked of a model that holds {self._model.span}; ask another peer")
        if self._model.settings is not None and version not in versions(self._model):
            raise BadAdapter(f"there is no adapter version '{version[:80]}' here; fetch it or use a newer one")
        reserved = max(1, min(max_length, expected_length or max_length))
        opened = Session(
            span=span,
            batch=batch,
            max_length=max_length,
            version=version,
            row_bytes=self.bytes_per_token(span),
            promised=capacity_for(reserved),
        )
        if opened.num_bytes() > self.free_bytes:
            raise CacheFull(
                f"a session of {opened.num_bytes()} bytes does not fit in {self.free_bytes} free; try another host"
            )
        self._sessions[session] = opened

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
            CacheFull: the session has outgrown what was reserved, and there is no more room; it stays open.
        """
        request = StepRequest(
            session=session,
            hidden_BTD=hidden_BTD,
            position=position,
            mask_BT=mask_BT,
            position_ids_BT=position_ids_BT,
            rows=rows,
        )
        (result,) = self.step_many([request])
        if isinstance(result, Exception):
            raise result
        return result

    def step_many(self, requests: Sequence[StepRequest]) -> list[Tensor | Exception]:
        """What `step` gives, or would raise, for each request; those that can are computed together.

        Together are sessions of the same span, at any positions and with any adapter versions. A request that is
        refused or fails leaves the others as they are. Of one session's requests the later go on from the earlier.
        """
        results: dict[int, Tensor | Exception] = {}
        rest = dict(enumerate(requests))
        while rest:
            first_of: dict[str, int] = {}
            for at, request in rest.items():
                first_of.setdefault(request.session, at)
            results |= self._step_each_once({at: rest.pop(at) for at in first_of.values()})
        return [results[at] for at in range(len(requests))]

    def check(self, request: StepRequest) -> int:
        """The length that a session would have after a step.

        Raises:
            BadSession: the step does not fit the session.
        """
        return check_request(self._find(request.session), request, self._model.source.hidden_size)

    def close(self, session: str) -> None:
        """Forget a session and free its bytes; one that is not open is fine, as both ends may close."""
        found = self._sessions.pop(session, None)
        if found is not None and found.placement is not None:
            self._store.release(found.placement)

    def _find(self, session: str) -> Session:
        found = self._sessions.get(session)
        if found is None:
            raise BadSession(f"session '{session[:40]}' is not open here; open it and send its inputs again")
        return found

    def _step_each_once(self, requests: Mapping[int, StepRequest]) -> dict[int, Tensor | Exception]:
        """At most one request for each session."""
        results: dict[int, Tensor | Exception] = {}
        by_span: dict[Span, list[int]] = {}
        for at, request in requests.items():
            try:
                by_span.setdefault(self._begin(request).span, []).append(at)
            except Exception as error:  # handed to the one who asked; the others go on
                results[at] = error
        for ats in by_span.values():
            steps = [(self._sessions[requests[at].session], requests[at]) for at in ats]
            spare = self.free_bytes - int(self.budget_bytes * _ROOM_FOR_COMPANY)
            self._passes.lie_together([session for session, _ in steps], spare)
            for at, (session, request), result in zip(ats, steps, self._passes.run(steps), strict=True):
                results[at] = result
                if isinstance(result, Exception):
                    self.close(request.session)
                else:
                    session.length = request.position + request.hidden_BTD.shape[1]
        return results

    def _begin(self, request: StepRequest) -> Session:
        """The session of a request, ready for it.

        Raises:
            BadSession: the request does not fit; nothing was changed.
            CacheFull: there is no room for the session's growth; nothing was changed.
        """
        length = self.check(request)
        found = self._sessions[request.session]
        capacity = self._passes.capacity(found, length)
        if found.num_bytes(capacity) - found.num_bytes() > self.free_bytes:
            raise CacheFull(
                f"the session has grown to {length} positions, {self.free_bytes} bytes are free; go on at another host"
            )
        done = False
        try:
            self._passes.begin(found, request, capacity)
            done = True
        finally:
            if not done:
                self.close(request.session)
        return found
