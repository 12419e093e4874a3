"""Where peers publish what they hold and find what others hold. The seam; hivemind_directory.py is the real one.

Entries are grouped by 16 blocks, so that no key grows with the whole swarm and a reader asks only for the blocks that
it routes through. What cannot be read or trusted is skipped, never raised: others' rubbish is not our error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Protocol

from blocks.spans import Span
from peers.errors import BadRecord
from peers.network import PeerId
from peers.records import (
    EvaluationRecord,
    PeerRecord,
    ProgressRecord,
    R,
    Record,
    SealCache,
    TrainerRecord,
    open_record,
)

logger = logging.getLogger(__name__)

GROUP_BLOCKS = 16
MAX_ENTRIES_PER_KEY = 4096


class Directory(Protocol):
    """Publish and find signed records of a run."""

    async def publish(self, record: Record) -> bool:
        """Sign and store this peer's record until it expires; False when no other peer took it.

        Raises:
            BadRecord: the record is another peer's, out of range, or too large.
        """

    async def find_hosts(self, run: str, span: Span) -> list[PeerRecord]:
        """Live records of the hosts that hold any block of `span`, ordered by peer id."""

    def read_host(self, run: str, peer: PeerId, blob: bytes) -> PeerRecord | None:
        """The sealed record that `peer` itself handed over; None where it cannot be read or trusted, or is too old."""

    async def find_progress(self, run: str, span: Span) -> list[ProgressRecord]:
        """Live progress of the hosts that hold any block of `span`, ordered by peer id."""

    async def find_trainers(self, run: str) -> list[TrainerRecord]:
        """Live records of the trainers of the run that have not left, ordered by peer id."""

    async def find_evaluations(self, run: str, number: int) -> list[EvaluationRecord]:
        """What trainers have measured with the adapter of round `number`, ordered by peer id."""

    async def store_run(self, run: str, blob: bytes, expires_at: float) -> bool:
        """Keep the run's signed settings (at most 4 kB) in the directory; any member may repeat it.

        Raises:
            BadRecord: the blob is too large.
        """

    async def find_run(self, run: str, is_valid: Callable[[bytes], bool]) -> bytes | None:
        """The run's settings: the first that `is_valid` accepts, as anybody may have stored anything."""


def groups_of(span: Span) -> range:
    """The numbers of the groups of blocks that `span` touches."""
    return range(span.start // GROUP_BLOCKS, (span.end - 1) // GROUP_BLOCKS + 1)


def keys_of(record: Record) -> list[str]:
    """The directory keys under which a record is stored, each with the peer id as its subkey."""
    if isinstance(record, TrainerRecord):
        return [trainers_key(record.run)]
    if isinstance(record, EvaluationRecord):
        return [evaluations_key(record.run, record.round)]
    return span_keys(record.run, record.kind, record.span)


def span_keys(run: str, kind: str, span: Span) -> list[str]:
    """The keys that together hold all records of `kind` for the blocks of `span`."""
    return [f"swarmtune/{run}/{kind}/{group}" for group in groups_of(span)]


def trainers_key(run: str) -> str:
    """The key of all trainers of a run."""
    return f"swarmtune/{run}/trainer"


def evaluations_key(run: str, number: int) -> str:
    """The key of what all trainers have measured with the adapter of one round."""
    return f"swarmtune/{run}/evaluation/{number}"


class RecordReader:
    """Turns what a key held into records: newest per peer, bad ones counted and logged once per peer and reason."""

    def __init__(self, cache: SealCache) -> None:
        self._cache = cache
        self._complained: set[tuple[str, str]] = set()
        self.num_refused = 0

    def read(self, entries: Iterable[tuple[str, bytes]], record_type: type[R], *, run: str, now: float) -> list[R]:
        """The good records among `entries` (subkey, blob), ordered by peer id."""
        best: dict[PeerId, R] = {}
        for subkey, blob in entries:
            try:
                record = open_record(blob, record_type, run=run, now=now, cache=self._cache)
                if record.peer != subkey:
                    raise BadRecord(f"a record of {record.peer} is stored as another peer's")
            except BadRecord as error:
                self._refuse(subkey, str(error))
                continue
            known = best.get(record.peer)
            if known is None or known.expires_at < record.expires_at:
                best[record.peer] = record
        return [best[peer] for peer in sorted(best)]

    def _refuse(self, subkey: str, reason: str) -> None:
        self.num_refused += 1
        complaint = (subkey[:64], reason.split(" ", 3)[-1][:40])
        if complaint not in self._complained and len(self._complained) < 1024:
            self._complained.add(complaint)
            logger.warning("record skipped entry=%r reason=%s", subkey[:64], reason[:200])


def overlapping(records: list[R], span: Span) -> list[R]:
    """The records that hold any block of `span`: a group is wider than the span that was asked for."""
    return [
        record
        for record in records
        if isinstance(record, TrainerRecord | EvaluationRecord)
        or (record.span.start < span.end and span.start < record.span.end)
    ]
