"""Serves decoding sessions: each is pinned to one snapshot, lives in the cache budget, and is freed by a deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from blocks.decoding.batched import BatchedDecoder
from blocks.decoding.cache import SessionCaches, most_bytes
from blocks.errors import BadSession
from blocks.snapshots import Snapshot, SnapshotShelf
from blocks.spans import Span
from blocks.worker import ComputeThread, Priority
from peers.chains.admission_queue import Admission
from peers.chains.edge import Edge
from peers.chains.hosted_session import HostedSession
from peers.chains.hosted_steps import HostedSteps, session_gone
from peers.chains.outbox import Asking
from peers.chains.train_service import check_span
from peers.errors import BadMessage, Refused
from peers.network import PeerId
from peers.streams.answering import Handler
from peers.streams.calls import Answer, Question
from peers.streams.messages import (
    CloseSession,
    Collect,
    Link,
    Opened,
    OpenSession,
    RefusalCode,
    Resume,
    Step,
)

PLAIN_LABEL = "plain"
MAX_SESSIONS = 1024  # short sessions take few cache bytes, but objects of their own


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeParts:
    """What a host lends to its sessions. `drop_versions` removes snapshots from the model that nobody needs.
    `published` is the label in the model of a published adapter, by its content; None where it is not served.
    """

    span: Span
    caches: SessionCaches
    thread: ComputeThread
    shelf: SnapshotShelf
    drop_versions: Callable[[list[Snapshot]], None]
    published: Callable[[bytes], str | None] = lambda _: None


class DecodeService(Handler):
    """One host's `decode` streams. Call `sweep` now and then; it ends sessions that fell silent."""

    def __init__(
        self,
        parts: DecodeParts,
        edge: Edge,
        pool: Asking,
        *,
        idle_seconds: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._parts, self._edge, self._clock, self._idle_seconds = parts, edge, clock, idle_seconds
        self._sessions: dict[str, HostedSession] = {}
        self._admission = Admission(parts.caches.budget_bytes)
        self._steps = HostedSteps(BatchedDecoder(parts.thread, parts.caches, clock=clock), edge, pool)

    def __len__(self) -> int:
        """How many sessions are open."""
        return len(self._sessions)

    @property
    def served_tokens(self) -> int:
        """Tokens of texts that have gone through here, prompts included."""
        return self._steps.served_tokens

    async def answer(self, question: Question) -> Answer:
        """Answer one question; see messages.py for what each carries."""
        match question.message:
            case OpenSession() as message:
                return await self._open(question, message)
            case Step() as message:
                return await self._step(question, message)
            case Collect() as message:
                return await self._steps.collect(self._own(question.peer, message.place), message.item)
            case Resume() as message:
                return await self._steps.resume(self._own(question.peer, message.session), message, question.wire)
            case Link() as message:
                session = self._own(question.peer, message.session)
                session.previous, session.onward = message.previous, message.onward
            case CloseSession() as message:
                closing = self._sessions.get(message.session)
                if closing is not None and closing.owner == question.peer:
                    await self._end([message.session])
            case _:
                raise BadMessage(f"a '{question.message.kind}' message does not belong on a decode stream")
        return Answer()

    async def stream_closed(self, peer: PeerId, stream: int) -> None:
        """Free the sessions of a client that is gone."""
        await self._end([k for k, s in self._sessions.items() if s.stream == stream])

    async def sweep(self) -> None:
        """Free the sessions that have been silent for too long."""
        now = self._clock()
        await self._end([k for k, s in self._sessions.items() if s.deadline <= now])

    async def end_all(self) -> None:
        """Free all sessions; their texts go on at other hosts."""
        await self._end(list(self._sessions))

    async def end_version(self, label: str) -> None:
        """Free the sessions of one version of the adapter, which is going to be dropped."""
        await self._end([k for k, s in self._sessions.items() if s.label == label])

    async def _open(self, question: Question, message: OpenSession) -> Answer:
        check_span(message.span, self._parts.span)
        if message.max_length > self._edge.max_positions:
            reason = f"{message.max_length} positions are asked for; this model has {self._edge.max_positions}"
            raise Refused(reason, RefusalCode.MALFORMED)
        key = message.session
        if key in self._sessions:
            raise BadSession(f"session {message.session} is open already; close it or choose another id")
        if len(self._sessions) >= MAX_SESSIONS:
            raise Refused(f"{MAX_SESSIONS} sessions are open here; try another host", RefusalCode.FULL)
        label, opened = self._version(message)
        # Taken before the first await, so that no round can drop the snapshot between the choice and the pin.
        is_pinned = self._parts.shelf.has(label)
        if is_pinned:
            self._parts.shelf.pin(label)
        session = self._sessions[key] = HostedSession(
            name=key,
            owner=question.peer,
            stream=question.stream,
            label=label,
            is_pinned=is_pinned,
            deadline=self._clock() + self._idle_seconds,
            previous=message.previous,
            onward=message.onward,
        )
        try:
            most = most_bytes(self._parts.caches, message.span, batch=message.batch, max_length=message.max_length)
            await self._admission.admit(
                key, question.peer, most, lambda: self._reserve(session, message), seconds=message.wait_seconds
            )
        except BaseException:
            # Cancelled, the job may be at work already: what it opens is closed after it. Not so where the stream
            # closed meanwhile and the session ended (and another may have its name).
            if self._sessions.get(key) is session:
                self._submit_end(key)
            raise
        if self._sessions.get(key) is not session:
            raise BadSession(f"session {message.session} was closed while it was opened; open it again")
        return Answer(message=opened)

    async def _reserve(self, session: HostedSession, message: OpenSession) -> None:
        """One try to open a session in the cache.

        Raises:
            CacheFull: there is no room now.
            BadSession: it was closed meanwhile, and must not be opened behind that.
        """
        if self._sessions.get(session.name) is not session:
            raise BadSession(f"session {session.name} was closed while it waited; open it again")
        await self._parts.thread.run(
            Priority.DECODE,
            lambda: self._parts.caches.open(
                session.name,
                span=message.span,
                batch=message.batch,
                max_length=message.max_length,
                expected_length=message.expected_length,
                version=session.label,
            ),
        )

    async def _step(self, question: Question, message: Step) -> Answer:
        session = self._find(message.session)
        session.check_sender(question.peer)
        if session.is_pinned and not self._parts.shelf.has(session.label):
            await self._end([session.name])
            raise Refused("this host no longer has that state of the adapter", RefusalCode.SNAPSHOT)
        session.deadline = self._clock() + self._idle_seconds
        return await self._steps.step(session, message, question)

    def _find(self, name: str) -> HostedSession:
        session = self._sessions.get(name)
        if session is None:
            raise session_gone(name)
        return session

    def _own(self, peer: PeerId, name: str) -> HostedSession:
        session = self._find(name)
        if session.owner != peer:
            raise session_gone(name)  # nobody learns which sessions others have
        return session

    def _version(self, message: OpenSession) -> tuple[str, Opened]:
        """Which version of the adapter a session computes with, and what its owner is told of it."""
        if message.adapter is not None:
            label = self._parts.published(message.adapter)
            if label is None or message.plain:
                raise Refused(f"adapter {message.adapter.hex()[:16]} is not served here", RefusalCode.ADAPTER)
            return label, Opened(round=0, digests={}, adapter=message.adapter)  # it belongs to no round
        snapshot = self._snapshot(message)
        if message.plain:
            return PLAIN_LABEL, Opened(round=snapshot.round, digests={})
        digests = {block: snapshot.digests[block] for block in message.span.blocks()}
        return snapshot.label, Opened(round=snapshot.round, digests=digests)

    def _snapshot(self, message: OpenSession) -> Snapshot:
        if message.digests is not None:
            found = self._parts.shelf.find(message.digests)
        elif message.round is not None:
            found = self._parts.shelf.of_round(message.round)
        else:
            found = self._parts.shelf.newest
        if found is None:
            raise Refused("this host no longer has that state of the adapter", RefusalCode.SNAPSHOT)
        return found

    async def _end(self, keys: Sequence[str]) -> None:
        """End sessions, all before anything is awaited: else one that waits is let in for another and ended after."""
        freed = [asyncio.wrap_future(self._submit_end(key)) for key in keys if key in self._sessions]
        # Shielded: a job that is cancelled before its turn would leave the cache behind for good.
        await asyncio.shield(asyncio.gather(*freed))

    def _submit_end(self, key: str) -> Future[None]:
        """Forget a session now and free its cache behind all jobs that it has queued."""
        session = self._sessions.pop(key)
        self._steps.forget(session)
        freed = self._parts.thread.submit(Priority.DECODE, lambda: self._parts.caches.close(key))
        self._admission.release(key)  # who is let in for it opens behind that job
        if session.is_pinned:
            self._parts.drop_versions(self._parts.shelf.unpin(session.label))
        return freed
