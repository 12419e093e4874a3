"""Steps of decoding sessions on one host: checked, computed once, and passed on to the next host or handed out."""

from __future__ import annotations

import time

import torch

from blocks.decoding.batched import BatchedDecoder
from blocks.decoding.sessions import StepRequest
from blocks.errors import BadSession
from peers.chains.edge import Edge
from peers.chains.history import StepInput, as_message
from peers.chains.hosted_session import HostedSession
from peers.chains.outbox import Asking, Onward, Outbox
from peers.chains.timings import told
from peers.errors import BadMessage, Refused
from peers.streams.calls import Answer, Question
from peers.streams.messages import RefusalCode, Resume, Step, StreamKind
from peers.streams.values import Place
from peers.streams.wire_format import WireFormat

STEP_SECONDS = 120.0  # a step that waits longer for its turn is refused, and its client asks another host
HISTORY_BYTES = 512 << 20  # of what all sessions put out; beyond it they are rebuilt from the client's own inputs


class HostedSteps:
    """The part of a decode service that computes."""

    def __init__(self, decoder: BatchedDecoder, edge: Edge, pool: Asking) -> None:
        self._decoder, self._edge, self._outbox = decoder, edge, Outbox()
        self._onward = Onward(pool=pool, kind=StreamKind.DECODE, seconds=STEP_SECONDS)
        self._history_bytes = 0
        self.served_tokens = 0
        """Of all texts, prompts included; guesses that were not right, and what came twice, are taken off again."""

    async def step(self, session: HostedSession, message: Step, question: Question) -> Answer:
        """Compute a step; answers once it is through the rest of the chain."""
        step = self._read(question.tensors, message)
        began = time.monotonic()
        output = await session.once(message.number, lambda: self._compute(session, step), replayed=message.replay > 0)
        seconds = time.monotonic() - began
        if session.onward is not None:
            passed = await self._pass_on(session.onward, message.number, output.passed_on(), question.wire)
            return told(passed, session.name, seconds)
        hidden = output.new_part().hidden_BTD
        if session.previous is None:
            return told(Answer(tensors=(hidden,)), session.name, seconds)
        self._outbox.close(session.name, str(message.number - 1))
        self._outbox.put(session.name, str(message.number), hidden)
        return told(Answer(), session.name, seconds)

    async def resume(self, session: HostedSession, message: Resume, wire: WireFormat | None) -> Answer:
        """Pass the last step on again, to hosts that have nothing of this session yet.

        Raises:
            Refused: what came before it is not kept here.
        """
        session.onward = message.onward
        again = session.history.again(message.depth) if session.history and session.number == message.number else None
        if again is None:
            reason = f"what came before step {message.number} is not kept here; send it through this host again"
            raise Refused(reason, RefusalCode.SESSION)
        return await self._pass_on(message.onward, message.number, again, wire)

    async def collect(self, session: HostedSession, item: str) -> Answer:
        """What comes out at the end of a chain.

        Raises:
            Refused: it did not come in time.
        """
        return Answer(tensors=(await self._outbox.take(session.name, item, seconds=STEP_SECONDS),))

    def forget(self, session: HostedSession) -> None:
        """The session ends: whoever waits for it is told, and what is kept of it goes."""
        self._drop_history(session)
        self._outbox.close(session.name)
        self._decoder.forget(session.name)

    async def _compute(self, session: HostedSession, step: StepInput) -> StepInput:
        """The step as it leaves these blocks; kept where a next host may have to be replaced."""
        here = step.here()
        request = StepRequest(
            session=session.name,
            hidden_BTD=here.hidden_BTD,
            position=here.position,
            mask_BT=here.mask_BS,
            position_ids_BT=here.positions_BT,
            rows=here.rows,
        )
        hidden = await self._decoder.step(request, client=str(session.owner), deadline_seconds=STEP_SECONDS)
        output = step.out(hidden)
        tokens = hidden.shape[0] * output.end if step.mask_BS is None else int(step.mask_BS.sum())
        self.served_tokens += tokens - session.tokens
        session.tokens = tokens
        if session.history is not None and session.onward is not None:
            self._history_bytes -= session.history.num_bytes
            session.history.add(output)
            self._history_bytes += session.history.num_bytes
            if self._history_bytes > HISTORY_BYTES:
                self._drop_history(session)
        return output

    def _drop_history(self, session: HostedSession) -> None:
        if session.history is not None:
            self._history_bytes -= session.history.num_bytes
            session.history = None

    async def _pass_on(self, onward: Place, number: int, step: StepInput, wire: WireFormat | None) -> Answer:
        message, tensors = as_message(onward.name, number, step)
        return await self._onward.send(onward, message, tensors, wire)

    def _read(self, tensors: tuple[torch.Tensor, ...], message: Step) -> StepInput:
        """The step's tensors, checked.

        Raises:
            BadMessage: they are not what the message announces.
        """
        expected = 1 + message.has_mask + message.has_positions
        if len(tensors) != expected:
            raise BadMessage(f"{len(tensors)} tensors came with a step, {expected} were announced")
        hidden = self._edge.hidden(tensors, most=3)
        batch, length = hidden.shape[:2]
        if message.replay >= length or (message.replay and (message.position or not message.depth)):
            raise BadMessage("a replay begins at position 0, is for this host, and ends before the new tokens")
        return StepInput(
            hidden_BTD=hidden,
            position=message.position,
            mask_BS=self._edge.mask(tensors[1], batch, message.position + length) if message.has_mask else None,
            positions_BT=self._edge.positions(tensors[-1], batch, length) if message.has_positions else None,
            rows=message.rows,
            replay=message.replay,
            depth=message.depth,
        )


def session_gone(name: str) -> BadSession:
    """Said about a session that is not (or not any more) open here."""
    return BadSession(f"session {name} is not open here; open it again and send its inputs")
