"""Kept-open streams to other peers, one per peer and kind, dialled when first needed; and the way to oneself.

A call to this peer's own id goes straight to its services, so a peer that holds every block trains and generates by
the same code without the network.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

import torch

from blocks.errors import BlockError
from peers.errors import BadMessage, NetworkFailed, PeerLost, Refused, StreamClosed, reason_of
from peers.network import Network, PeerId
from peers.streams.answering import Handler, as_refused
from peers.streams.calls import Answer, Caller, Question, dial
from peers.streams.messages import AskInfo, Hello, Message, RefusalCode, StreamKind
from peers.streams.traffic import Traffic
from peers.streams.wire_format import WireFormat

LOCAL_STREAM = 0
QUIET_SECONDS = 5.0
PROBE_SECONDS = 10.0  # long enough for a link that is full of activations


class Pool:
    """Ask any peer. Owned by the node, which closes it."""

    def __init__(
        self,
        network: Network,
        hello: Callable[[], Hello],
        traffic: Traffic,
        local: Mapping[str, Handler],
        *,
        quiet_seconds: float = QUIET_SECONDS,
        probe_seconds: float = PROBE_SECONDS,
    ) -> None:
        """`quiet_seconds` without an answer, and a peer is asked whether it is there; it has `probe_seconds` to say."""
        self._quiet_seconds, self._probe_seconds = quiet_seconds, probe_seconds
        self.me = network.peer_id
        self._network, self._hello, self._traffic = network, hello, traffic
        self._local = dict(local)
        self._callers: dict[tuple[PeerId, str], Caller] = {}
        self._dialling: dict[tuple[PeerId, str], asyncio.Lock] = {}

    def add_local(self, kind: str, handler: Handler) -> None:
        """Serve this peer's own calls of a kind."""
        self._local[kind] = handler

    async def call(
        self,
        peer: PeerId,
        kind: str,
        message: Message,
        tensors: Sequence[torch.Tensor] = (),
        *,
        seconds: float,
        wire: WireFormat | None = None,
    ) -> Answer:
        """Ask `peer`, over the stream that stands or a new one.

        Float tensors travel in the format `wire` (None: as they are), and so do those of the answer. To this peer
        itself they go as they are, and it is told the format in which to pass them on.

        Raises:
            PeerLost: the peer is gone, did not answer within `seconds`, or answered nonsense.
            Refused: the peer says no, with a code and a reason.
        """
        caller: Caller | None = None
        try:
            async with asyncio.timeout(seconds):
                if peer == self.me:
                    return await self._call_self(kind, message, tensors, wire)
                caller = await self._caller(peer, kind)
                answer = asyncio.create_task(caller.call(message, tensors, seconds=seconds, wire=wire))
                try:
                    await self._while_there(peer, kind, answer)
                    return await answer
                finally:
                    answer.cancel()
        except Refused as error:
            if error.code in (RefusalCode.RUN, RefusalCode.VERSION, RefusalCode.MEMBER):
                raise PeerLost(reason_of(peer, error)) from error
            raise
        except TimeoutError as error:
            await self._forget(peer, kind, caller)
            raise PeerLost(f"peer {peer} did not answer a '{message.kind}' in {seconds:.0f} s") from error
        except (StreamClosed, NetworkFailed, BadMessage) as error:
            await self._forget(peer, kind, caller)
            raise PeerLost(reason_of(peer, error)) from error

    async def close(self) -> None:
        """Close every stream."""
        callers, self._callers = list(self._callers.values()), {}
        for caller in callers:
            await caller.close()

    async def _while_there(self, peer: PeerId, kind: str, answer: asyncio.Task[Answer]) -> None:
        """Until `answer` is done; when it takes long, ask now and then whether the peer is there at all.

        A host that computes, or waits for others, answers such a question at once; one that is frozen does not, and a
        call with minutes to go need not wait for it.

        Raises:
            StreamClosed: it did not answer.
        """
        while not (await asyncio.wait([answer], timeout=self._quiet_seconds))[0]:
            if kind == StreamKind.INFO:
                continue  # this is such a question itself
            try:
                await self.call(peer, StreamKind.INFO, AskInfo(), seconds=self._probe_seconds)
            except (PeerLost, Refused) as error:
                raise StreamClosed(f"silent for {self._quiet_seconds:.0f} s, and {error}") from error

    async def _call_self(
        self, kind: str, message: Message, tensors: Sequence[torch.Tensor], wire: WireFormat | None
    ) -> Answer:
        handler = self._local.get(kind)
        if handler is None:
            raise Refused(f"this peer does not serve '{kind}'", RefusalCode.SPAN)
        question = Question(peer=self.me, stream=LOCAL_STREAM, message=message, tensors=tuple(tensors), wire=wire)
        try:
            return await handler.answer(question)
        except (BadMessage, BlockError) as error:
            raise as_refused(error) from error

    async def _caller(self, peer: PeerId, kind: str) -> Caller:
        key = (peer, kind)
        async with self._dialling.setdefault(key, asyncio.Lock()):
            caller = self._callers.get(key)
            if caller is None or caller.is_closed:
                caller = self._callers[key] = await dial(self._network, peer, kind, self._hello(), self._traffic)
            return caller

    async def _forget(self, peer: PeerId, kind: str, caller: Caller | None) -> None:
        """Close a caller that failed; another that was dialled meanwhile stays."""
        if caller is not None:
            if self._callers.get((peer, kind)) is caller:
                del self._callers[peer, kind]
            await caller.close()
