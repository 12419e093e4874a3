"""One decoding session as its host keeps it: who owns it, its neighbours in the chain, and what it put out.

The client keeps every number's step in order and never two at once; so a step that comes again (after a neighbour was
replaced) is passed on again and not computed again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

from blocks.errors import BadSession
from peers.chains.history import History, StepInput
from peers.network import PeerId
from peers.streams.values import Place


@dataclass(slots=True, eq=False)
class HostedSession:
    """State of one session. `history` is None where nothing goes on to another host, or there was no room for it.
    `tokens` are those of its text so far, over all rows.
    """

    name: str
    owner: PeerId
    stream: int
    label: str
    is_pinned: bool
    deadline: float
    previous: Place | None
    onward: Place | None
    number: int = -1
    tokens: int = 0
    history: History | None = field(default_factory=History)
    is_replayed: bool = False
    _running: asyncio.Task[StepInput] | None = None

    def check_sender(self, peer: PeerId) -> None:
        """Refuse steps from anyone but the neighbour that the owner named, or the owner where there is none.

        Raises:
            BadSession: another peer sends; the owner may have named it where word of that did not come.
        """
        if peer != (self.owner if self.previous is None else self.previous.peer):
            raise BadSession("steps of a session come from its owner, or from the neighbour that its owner named")

    async def once(
        self, number: int, compute: Callable[[], Coroutine[object, object, StepInput]], *, replayed: bool = False
    ) -> StepInput:
        """The step of this number as it leaves here, computed at its first coming, and once more where all before it
        is `replayed` with it. A caller that is cancelled leaves the work to those who ask again.

        Raises:
            BadSession: an older step comes late.
        """
        if number < self.number:
            raise BadSession(f"step {number} comes after step {self.number}; it is not waited for any more")
        while self._is_news(number, replayed) and self._running is not None and not self._running.done():
            await asyncio.wait([self._running])
        if self._is_news(number, replayed):
            self.number, self.is_replayed = number, replayed
            self._running = asyncio.create_task(compute())
            self._running.add_done_callback(self._forget_failure)
        if self._running is None:
            raise BadSession(f"step {number} comes after step {self.number}; it is not waited for any more")
        return await asyncio.shield(self._running)

    def _is_news(self, number: int, replayed: bool) -> bool:
        return number > self.number or (number == self.number and replayed and not self.is_replayed)

    def _forget_failure(self, task: asyncio.Task[StepInput]) -> None:
        """What failed may be tried again under its number."""
        if (task.cancelled() or task.exception() is not None) and self._running is task:
            self.number -= 1
            self._running = None
