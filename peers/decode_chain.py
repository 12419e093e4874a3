"""One text over a chain of hosts. The client keeps every hop's inputs, so a dead host is replaced by one prefill.

All hosts of a session serve the same state of the adapter, named by content; so the text goes on unchanged.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from blocks.spans import Span
from peers.errors import NoRoute, PeerLost, Refused
from peers.messages import CloseSession, Opened, OpenSession, RefusalCode, Step, StreamKind
from peers.network import PeerId
from peers.pool import Pool
from peers.router import Router
from peers.routing import Hop

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionConfig:
    """One text: rows, longest length, whether the adapter is used, and the dtype in which activations travel."""

    batch: int
    max_length: int
    plain: bool = False
    wire_dtype: torch.dtype = torch.bfloat16
    call_seconds: float = 120.0
    max_tries: int = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInput:
    """What enters a hop: hidden [B, T, D] at `position`, the mask [B, position + T] and positions [B, T] where known.

    `rows` picks and reorders the batch first.
    """

    hidden_BTD: torch.Tensor
    position: int
    mask_BS: torch.Tensor | None = None
    positions_BT: torch.Tensor | None = None
    rows: tuple[int, ...] | None = None


class _History:
    """Everything that one hop was fed, to feed it to a replacement."""

    def __init__(self) -> None:
        self._hidden: list[torch.Tensor] = []
        self._positions: list[torch.Tensor] = []
        self._length = 0

    def add(self, step: StepInput) -> None:
        self.prepare(step)
        self._hidden.append(step.hidden_BTD)
        if step.positions_BT is not None:
            self._positions.append(step.positions_BT)
        self._length += step.hidden_BTD.shape[1]

    def prepare(self, step: StepInput) -> None:
        """Roll back to the step's position and put the batch in its order."""
        if step.rows is not None and self._hidden:
            rows = torch.tensor(step.rows)
            self._hidden = [torch.cat(self._hidden, dim=1)[rows]]
            self._positions = [torch.cat(self._positions, dim=1)[rows]] if self._positions else []
        if step.position < self._length:
            self._hidden = [torch.cat(self._hidden, dim=1)[:, : step.position]] if step.position else []
            if self._positions:
                self._positions = [torch.cat(self._positions, dim=1)[:, : step.position]] if step.position else []
            self._length = step.position

    def replay(self, step: StepInput) -> StepInput | None:
        """All before `step` as one prefill, or None at the beginning of a text."""
        if not self._length:
            return None
        return StepInput(
            hidden_BTD=torch.cat(self._hidden, dim=1),
            position=0,
            mask_BS=None if step.mask_BS is None else step.mask_BS[:, : self._length],
            positions_BT=torch.cat(self._positions, dim=1) if self._positions else None,
        )


@dataclass(slots=True)
class _Leg:
    hop: Hop
    session: str
    history: _History
    opened: Opened


class DecodeSession:
    """A session over the chain. Steps come one after the other; `close` frees the hosts' caches."""

    def __init__(self, pool: Pool, router: Router, whole: Span, config: SessionConfig) -> None:
        self._pool, self._router, self._whole, self._config = pool, router, whole, config
        self._legs: list[_Leg] = []
        self.replaced = 0

    @property
    def rounds(self) -> frozenset[int]:
        """The rounds whose adapter serves this text: one, unless no host had a common one."""
        return frozenset(leg.opened.round for leg in self._legs)

    async def step(self, step: StepInput) -> torch.Tensor:
        """Feed the chain; returns what leaves the last block, [B, T, D] fp32.

        Raises:
            NoRoute: some blocks have no live holder.
            Refused: hosts refuse for a reason that others would share.
        """
        if not self._legs:
            self._legs = await self._open_chain(self._whole, None)
        current, place, tries = step, 0, 0
        while place < len(self._legs):
            leg = self._legs[place]
            try:
                output = await self._ask(leg, current)
            except (PeerLost, Refused) as error:
                tries = self._note_failure(leg.hop.peer, error, tries)
                self._legs[place : place + 1] = await self._replace(leg, current)
                continue
            leg.history.add(current)
            current = replace(current, hidden_BTD=output)
            place += 1
        return current.hidden_BTD

    async def close(self) -> None:
        """Free the caches; a host that cannot be told frees its own by deadline."""
        legs, self._legs = self._legs, []
        for leg in legs:
            await self._close_leg(leg)

    async def _replace(self, leg: _Leg, step: StepInput) -> list[_Leg]:
        """Other hosts for a leg's blocks, with the same bits of the adapter, brought to where the leg stood."""
        self.replaced += 1
        leg.history.prepare(step)
        past = leg.history.replay(step)
        for _ in range(self._config.max_tries):
            try:
                fresh = await self._open_chain(leg.hop.span, leg.opened.digests or None)
            except Refused as error:
                if error.code != RefusalCode.SNAPSHOT:
                    raise
                raise NoRoute(
                    f"no other host holds blocks {leg.hop.span} with the adapter of round {leg.opened.round}, with "
                    "which this text began; begin the text again"
                ) from error
            current = past
            try:
                for each in fresh:
                    if current is not None:
                        output = await self._ask(each, current)
                        each.history.add(current)
                        current = replace(current, hidden_BTD=output)
            except (PeerLost, Refused) as error:
                self._note_failure(each.hop.peer, error, 0)
                continue
            return fresh
        raise NoRoute(f"blocks {leg.hop.span} failed {self._config.max_tries} times in a row; see the log")

    async def _open_chain(self, span: Span, digests: Mapping[int, bytes] | None) -> list[_Leg]:
        """Open sessions over `span`: with the wanted bits, or else all at one round where they have one in common."""
        avoid: frozenset[PeerId] = frozenset()
        last: Refused | None = None
        for _ in range(self._config.max_tries):
            try:
                hops = await self._router.fast(span, avoid)
            except NoRoute:
                if last is not None:
                    raise last from None
                raise
            legs: list[_Leg] = []
            try:
                for hop in hops:
                    legs.append(await self._open_leg(hop, digests, None))
                if digests is None and len({leg.opened.round for leg in legs}) > 1:
                    legs = await self._at_one_round(legs)
            except (PeerLost, Refused) as error:
                await self._give_up(legs)
                if isinstance(error, PeerLost):
                    self._note_failure(hop.peer, error, 0)
                else:
                    if error.code == RefusalCode.MALFORMED:
                        raise
                    last, avoid = error, avoid | {hop.peer}
                continue
            return legs
        raise last or NoRoute(f"no chain over blocks {span} could be opened; see the log for each reason")

    async def _at_one_round(self, legs: list[_Leg]) -> list[_Leg]:
        """Reopen the legs that are ahead at the oldest round among them; keep a mixture where that is gone."""
        number = min(leg.opened.round for leg in legs)
        for place, leg in enumerate(legs):
            if leg.opened.round == number:
                continue
            try:
                older = await self._open_leg(leg.hop, None, number)
            except Refused as error:
                logger.warning("blocks %s stay at round %d: %s", leg.hop.span, leg.opened.round, error)
                continue
            await self._close_leg(leg)
            legs[place] = older
        return legs

    async def _open_leg(self, hop: Hop, digests: Mapping[int, bytes] | None, number: int | None) -> _Leg:
        session = uuid.uuid4().hex
        message = OpenSession(
            session=session,
            span=hop.span,
            batch=self._config.batch,
            max_length=self._config.max_length,
            digests=None if digests is None else {block: digests[block] for block in hop.span.blocks()},
            round=number,
            plain=self._config.plain,
        )
        seconds = self._config.call_seconds
        answer = await self._pool.call(hop.peer, StreamKind.DECODE, message, seconds=seconds)
        if not isinstance(answer.message, Opened):
            raise PeerLost(f"peer {hop.peer} answered an open with '{answer.message.kind}'")
        return _Leg(hop=hop, session=session, history=_History(), opened=answer.message)

    async def _ask(self, leg: _Leg, step: StepInput) -> torch.Tensor:
        message = Step(
            session=leg.session,
            position=step.position,
            has_mask=step.mask_BS is not None,
            has_positions=step.positions_BT is not None,
            rows=step.rows,
        )
        local = leg.hop.peer == self._pool.me
        tensors = [step.hidden_BTD if local else step.hidden_BTD.to(self._config.wire_dtype)]
        if step.mask_BS is not None:
            tensors.append(step.mask_BS.to(torch.uint8))
        if step.positions_BT is not None:
            tensors.append(step.positions_BT.to(torch.int32))
        seconds = self._config.call_seconds
        answer = await self._pool.call(leg.hop.peer, StreamKind.DECODE, message, tensors, seconds=seconds)
        if len(answer.tensors) != 1 or answer.tensors[0].shape != step.hidden_BTD.shape:
            raise PeerLost(f"peer {leg.hop.peer} answered with a tensor of another shape")
        return answer.tensors[0].float()

    def _note_failure(self, peer: PeerId, error: Exception, tries: int) -> int:
        """Steer later routes by what went wrong; counts, and raises what no other host would do better."""
        if isinstance(error, Refused) and error.code == RefusalCode.MALFORMED:
            raise error
        logger.warning("hop failed peer=%s reason=%s", peer, error)
        if isinstance(error, PeerLost):
            self._router.failed(peer, str(error))
        if tries + 1 >= self._config.max_tries:
            raise NoRoute(f"a step failed {tries + 1} times, last at peer {peer}: {error}") from error
        return tries + 1

    async def _give_up(self, legs: list[_Leg]) -> None:
        for leg in legs:
            await self._close_leg(leg)

    async def _close_leg(self, leg: _Leg) -> None:
        try:
            message = CloseSession(session=leg.session)
            await self._pool.call(leg.hop.peer, StreamKind.DECODE, message, seconds=CLOSE_SECONDS)
        except (PeerLost, Refused) as error:
            logger.debug("close not delivered peer=%s reason=%s", leg.hop.peer, error)
