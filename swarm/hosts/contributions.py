"""What a peer has given since its identity first started: tokens of texts served, and tokens trained.

Kept in a small file beside the checkpoints, so that a peer that is started again goes on counting. A damaged file costs
the count and nothing else.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peers.network import PeerId
from peers.records import MAX_GIVEN_TOKENS
from swarm.whole_file import replace_file

logger = logging.getLogger(__name__)

FILE_NAME = "contributions.json"  # in a peer's state directory
_MAX_BYTES = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """Tokens, each at most what a record can tell. Prompts count as served, and what has a label as trained."""

    served_tokens: int = 0
    trained_tokens: int = 0

    def plus(self, more: Given) -> Given:
        """The sum of both."""
        return Given(
            served_tokens=_bounded(self.served_tokens + more.served_tokens),
            trained_tokens=_bounded(self.trained_tokens + more.trained_tokens),
        )


class Contributions:
    """Adds up what a peer's hosts give, one after the other as it moves; on the node's loop, as they count there.

    Tell others what `save` gives: a peer that was killed then never says less than before.
    """

    def __init__(self, state: Path, peer: PeerId) -> None:
        self._path, self._peer = state / FILE_NAME, peer
        self._before = self._saved = load_given(self._path, peer)
        self._now: Callable[[], Given] | None = None
        self._saving = asyncio.Lock()

    def begin(self, now: Callable[[], Given]) -> None:
        """A host serves from here on; `now` is what it has given so far."""
        self.end()
        self._now = now

    def end(self) -> None:
        """It serves no more, and is not asked again."""
        self._before, self._now = self.total(), None

    def total(self) -> Given:
        """All of it."""
        return self._before if self._now is None else self._before.plus(self._now())

    @property
    def is_news(self) -> bool:
        """Whether there is more than was saved."""
        return self.total() != self._saved

    async def save(self) -> Given:
        """Write the total where it has changed, and give it. What cannot be written is counted on in memory."""
        async with self._saving:
            total = self.total()
            if total != self._saved:
                self._saved = total
                try:
                    await asyncio.to_thread(save_given, self._path, self._peer, total)
                except OSError as error:
                    logger.warning("what this peer has given was not written: %s", error)
            return total


def load_given(path: Path, peer: PeerId) -> Given:
    """What `peer` has given before; nothing where the file is another identity's, damaged, or not there."""
    try:
        with path.open("rb") as file:
            saved = json.loads(file.read(_MAX_BYTES))
    except FileNotFoundError:
        return Given()
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("what this peer has given is counted anew path=%s reason=%s", path, error)
        return Given()
    match saved:
        case {"peer": str(owner), "served_tokens": served, "trained_tokens": trained}:
            if owner != peer:
                return Given()
            if all(type(each) is int and 0 <= each <= MAX_GIVEN_TOKENS for each in (served, trained)):
                return Given(served_tokens=served, trained_tokens=trained)
    logger.warning("what this peer has given is counted anew path=%s reason=malformed", path)
    return Given()


def save_given(path: Path, peer: PeerId, given: Given) -> None:
    """Replace the file whole; OSError where the disk is full or read-only, and what was there stays."""
    plain = {"peer": peer, "served_tokens": given.served_tokens, "trained_tokens": given.trained_tokens}
    replace_file(path, json.dumps(plain).encode())


def _bounded(tokens: int) -> int:
    return max(0, min(tokens, MAX_GIVEN_TOKENS))
