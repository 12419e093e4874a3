"""Stand-ins that obey the same rules as the real things, for tests that need no network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from blocks.spans import Span
from peers.directory import evaluations_key, keys_of, overlapping, span_keys, trainers_key
from peers.errors import BadRecord
from peers.identity import Identity, load_or_create
from peers.network import PeerId
from peers.records import (
    MAX_SEALED_BYTES,
    EvaluationRecord,
    PeerRecord,
    ProgressRecord,
    R,
    Record,
    TrainerRecord,
    check_life,
    check_record,
)

RUN = "0123456789abcdef0123456789abcdef"


def fake_peer_id(name: str) -> PeerId:
    """A well-formed peer id that belongs to nobody."""
    digits = hashlib.sha256(name.encode()).hexdigest().replace("0", "z")
    return PeerId("Qm" + digits[:44])


def new_identity(directory: Path, name: str) -> Identity:
    """A real key in a file of its own."""
    return load_or_create(directory / f"{name}.id")


def peer_record(
    peer: str, span: Span, *, speed: float = 100.0, expires_at: float = 1060.0, run: str = RUN
) -> PeerRecord:
    """A plausible record of a host."""
    return PeerRecord(
        run=run,
        peer=PeerId(peer),
        span=span,
        tokens_per_second=speed,
        backward_tokens_per_second=speed / 2,
        queue_seconds=0.0,
        round=3,
        cache_free_bytes=1 << 30,
        addresses=("/ip4/127.0.0.1/tcp/4001",),
        protocol=(1, 1),
        software="swarmtune 0.1.0",
        dtype="f32",
        nickname="ann",
        expires_at=expires_at,
    )


class FakeDirectory:
    """A `peers.directory.Directory` in memory. `view` gives each peer its own window on one shared content."""

    def __init__(self, clock: Callable[[], float], peer: PeerId | None = None) -> None:
        self._clock, self._peer = clock, peer
        self._entries: dict[str, dict[str, Record]] = {}
        self._runs: dict[str, dict[str, tuple[bytes, float]]] = {}
        self.handed: dict[bytes, PeerRecord] = {}
        """What sealed records say; others cannot be read."""

    def view(self, peer: PeerId) -> FakeDirectory:
        """The same content as `peer` sees it: it may publish only its own records."""
        other = FakeDirectory(self._clock, peer)
        other._entries, other._runs, other.handed = self._entries, self._runs, self.handed
        return other

    async def publish(self, record: Record) -> bool:
        if self._peer is not None and record.peer != self._peer:
            raise BadRecord(f"peer {self._peer} cannot sign a record of {record.peer}")
        check_record(record)
        stored = True
        for key in keys_of(record):
            entries = self._entries.setdefault(key, {})
            known = entries.get(record.peer)
            if record.expires_at <= self._clock() or (known is not None and known.expires_at >= record.expires_at):
                stored = False
                continue
            entries[record.peer] = record
        return stored

    async def find_hosts(self, run: str, span: Span) -> list[PeerRecord]:
        return overlapping(self._find(span_keys(run, PeerRecord.kind, span), PeerRecord, run), span)

    def read_host(self, run: str, peer: PeerId, blob: bytes) -> PeerRecord | None:
        record = self.handed.get(blob)
        return record if record is not None and (record.run, record.peer) == (run, peer) else None

    async def find_progress(self, run: str, span: Span) -> list[ProgressRecord]:
        return overlapping(self._find(span_keys(run, ProgressRecord.kind, span), ProgressRecord, run), span)

    async def find_trainers(self, run: str) -> list[TrainerRecord]:
        return [each for each in self._find([trainers_key(run)], TrainerRecord, run) if not each.left]

    async def find_evaluations(self, run: str, number: int) -> list[EvaluationRecord]:
        return self._find([evaluations_key(run, number)], EvaluationRecord, run)

    async def store_run(self, run: str, blob: bytes, expires_at: float) -> bool:
        if len(blob) > MAX_SEALED_BYTES:
            raise BadRecord(f"the run's settings take {len(blob)} bytes; at most {MAX_SEALED_BYTES} fit")
        self._runs.setdefault(run, {})[self._peer or ""] = (blob, expires_at)
        return True

    async def find_run(self, run: str, is_valid: Callable[[bytes], bool]) -> bytes | None:
        live = [blob for blob, expires_at in self._runs.get(run, {}).values() if expires_at > self._clock()]
        return next((blob for blob in live if is_valid(blob)), None)

    def _find(self, keys: list[str], record_type: type[R], run: str) -> list[R]:
        best: dict[PeerId, R] = {}
        for key in keys:
            for record in self._entries.get(key, {}).values():
                try:
                    check_life(record.expires_at, self._clock())
                except BadRecord:
                    continue
                known = best.get(record.peer)
                newer = known is None or known.expires_at < record.expires_at
                if isinstance(record, record_type) and record.run == run and newer:
                    best[record.peer] = record
        return [best[peer] for peer in sorted(best)]
