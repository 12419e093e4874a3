"""The directory over hivemind's DHT, and the rule by which this node stores others' records.

The DHT keeps, for each key and subkey, the value with the latest expiration, whoever stored it. So that nobody can push
out another peer's record, nodes check before they store or pass on: an entry under a peer id must be sealed by that
peer, and expire exactly when its seal says.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Any

from hivemind.dht.crypto import DHTRecord, RecordValidatorBase
from hivemind.dht.node import DHTNode
from hivemind.utils import MSGPackSerializer
from hivemind.utils.timed_storage import get_dht_time

from blocks.spans import Span
from peers.directory import (
    MAX_ENTRIES_PER_KEY,
    RecordReader,
    evaluations_key,
    keys_of,
    overlapping,
    span_keys,
    trainers_key,
)
from peers.errors import BadRecord
from peers.identity import Identity
from peers.network import PeerId
from peers.private.gate import Gate
from peers.records import (
    MAX_SEALED_BYTES,
    EvaluationRecord,
    PeerRecord,
    ProgressRecord,
    R,
    Record,
    SealCache,
    TrainerRecord,
    is_peer_id,
    open_sealed,
    seal,
    seal_record,
)

logger = logging.getLogger(__name__)

_RUN_KIND, _REVOKED_KIND, _PUBLISHED_KIND = "run", "revoked", "published"
_WORDS = {_RUN_KIND: "settings", _REVOKED_KIND: "revocations", _PUBLISHED_KIND: "adapters"}
_MAX_SEALED_RUN_BYTES = 2 * MAX_SEALED_BYTES  # a run's 4 kB inside a member's envelope
_MAX_COPIES = 4
_KINDS = dict.fromkeys(("peer", "progress", "trainer", "evaluation"), MAX_SEALED_BYTES)
_KINDS |= dict.fromkeys((_RUN_KIND, _REVOKED_KIND, _PUBLISHED_KIND), _MAX_SEALED_RUN_BYTES)


class SealValidator(RecordValidatorBase):  # type: ignore[misc]
    """Refuses entries under a peer id that this peer did not seal, or with another expiration than the sealed one.

    In a private run also those of peers that are known not to be members, or not to have the role for it.
    """

    def __init__(self, cache: SealCache, gate: Gate | None = None) -> None:
        self._cache, self._gate = cache, gate

    def validate(self, record: DHTRecord) -> bool:
        """Whether this node stores, or believes, `record`. Entries that are not ours to judge pass."""
        try:
            subkey = MSGPackSerializer.loads(record.subkey) if record.subkey else None
            if not isinstance(subkey, str) or not is_peer_id(subkey):
                return True
            blob = MSGPackSerializer.loads(record.value)
            kind = _kind_of(blob)
            signer, payload = open_sealed(blob, kind, most=_KINDS[kind], cache=self._cache)
        except (BadRecord, ValueError, TypeError, KeyError) as error:
            logger.debug("entry refused reason=%s", error)
            return False
        if self._gate is not None and not self._gate.may_publish(signer, kind):
            logger.debug("entry refused reason=no member with the role for it signer=%s kind=%s", signer, kind)
            return False
        return signer == subkey and payload.get("expires_at") == record.expiration_time


class HivemindDirectory:
    """Implements `directory.Directory`. `cache` is shared with the node's SealValidator."""

    def __init__(self, node: DHTNode, identity: Identity, cache: SealCache) -> None:
        self.node, self._identity = node, identity
        self._reader = RecordReader(cache)
        self._cache = cache

    @property
    def num_refused(self) -> int:
        """How many entries were skipped since the start."""
        return self._reader.num_refused

    async def publish(self, record: Record) -> bool:
        """See Directory."""
        blob = await asyncio.to_thread(seal_record, self._identity, record)
        return await self._store(keys_of(record), blob, record.expires_at)

    async def find_hosts(self, run: str, span: Span) -> list[PeerRecord]:
        """See Directory."""
        return overlapping(await self._find(span_keys(run, PeerRecord.kind, span), PeerRecord, run), span)

    def read_host(self, run: str, peer: PeerId, blob: bytes) -> PeerRecord | None:
        """See Directory."""
        return next(iter(self._reader.read([(str(peer), blob)], PeerRecord, run=run, now=get_dht_time())), None)

    async def find_progress(self, run: str, span: Span) -> list[ProgressRecord]:
        """See Directory."""
        return overlapping(await self._find(span_keys(run, ProgressRecord.kind, span), ProgressRecord, run), span)

    async def find_trainers(self, run: str) -> list[TrainerRecord]:
        """See Directory."""
        return [each for each in await self._find([trainers_key(run)], TrainerRecord, run) if not each.left]

    async def find_evaluations(self, run: str, number: int) -> list[EvaluationRecord]:
        """See Directory."""
        found = await self._find([evaluations_key(run, number)], EvaluationRecord, run)
        return [record for record in found if record.round == number]

    async def store_run(self, run: str, blob: bytes, expires_at: float) -> bool:
        """See Directory. A few copies are enough: where others keep theirs, this peer adds none."""
        return await self._store_copy(_RUN_KIND, run, blob, expires_at)

    async def find_run(self, run: str, is_valid: Callable[[bytes], bool]) -> bytes | None:
        """See Directory."""
        copies = dict.fromkeys(copy for _, copy in await self._copies(_RUN_KIND, run))
        return next((copy for copy in copies if is_valid(copy)), None)

    async def store_revoked(self, run: str, blob: bytes, expires_at: float) -> bool:
        """Keep the owner's list of those revoked (at most 4 kB) in the directory, as `store_run` keeps the settings."""
        return await self._store_copy(_REVOKED_KIND, run, blob, expires_at)

    async def find_revoked(self, run: str) -> list[bytes]:
        """All lists that peers have stored, each once, in no order. Anybody may have stored anything."""
        return list(dict.fromkeys(copy for _, copy in await self._copies(_REVOKED_KIND, run)))

    async def store_published(self, run: str, blob: bytes, expires_at: float) -> bool:
        """Keep the owner's list of published adapters (at most 4 kB) in the directory, as `store_run` the settings."""
        return await self._store_copy(_PUBLISHED_KIND, run, blob, expires_at)

    async def find_published(self, run: str) -> list[bytes]:
        """All such lists that peers have stored, each once, in no order. Anybody may have stored anything."""
        return list(dict.fromkeys(copy for _, copy in await self._copies(_PUBLISHED_KIND, run)))

    async def _store_copy(self, kind: str, run: str, blob: bytes, expires_at: float) -> bool:
        if len(blob) > MAX_SEALED_BYTES:
            raise BadRecord(f"the run's {_WORDS[kind]} take {len(blob)} bytes; at most {MAX_SEALED_BYTES} fit")
        copies = await self._copies(kind, run)
        others = {signer for signer, copy in copies if copy == blob and signer != self._identity.peer}
        if len(others) >= _MAX_COPIES:
            return True
        payload = {"run": run, "blob": blob, "expires_at": expires_at}
        sealed = await asyncio.to_thread(seal, self._identity, kind, payload, most=_MAX_SEALED_RUN_BYTES)
        return await self._store([_run_key(run, kind)], sealed, expires_at)

    async def _copies(self, kind: str, run: str) -> list[tuple[str, bytes]]:
        copies = []
        for _, sealed in await self._entries([_run_key(run, kind)]):
            try:
                signer, payload = open_sealed(sealed, kind, most=_MAX_SEALED_RUN_BYTES, cache=self._cache)
            except BadRecord as error:
                logger.debug("copy of a run's record skipped kind=%s reason=%s", kind, error)
                continue
            copy = payload.get("blob")
            if payload.get("run") == run and isinstance(copy, bytes):
                copies.append((str(signer), copy))
        return copies

    async def _store(self, keys: list[str], blob: bytes, expires_at: float) -> bool:
        subkeys = [str(self._identity.peer)] * len(keys)
        stored = await self.node.store_many(keys, [blob] * len(keys), expires_at, subkeys=subkeys)
        return all(stored.values())

    async def _find(self, keys: list[str], record_type: type[R], run: str) -> list[R]:
        entries = await self._entries(keys)
        # Off the loop: a first look at a large swarm is hundreds of signatures.
        return await asyncio.to_thread(self._reader.read, entries, record_type, run=run, now=get_dht_time())

    async def _entries(self, keys: list[str]) -> list[tuple[str, bytes]]:
        # The replicas of a key differ by subkey, so a node's own copy is never enough: ask for the latest.
        found = await self.node.get_many(keys, sufficient_expiration_time=float("inf"))
        return [entry for answer in found.values() for entry in _blobs_in(answer)]


def _blobs_in(answer: Any) -> Iterator[tuple[str, bytes]]:
    if answer is None or not isinstance(answer.value, dict):
        return
    for subkey, entry in list(answer.value.items())[:MAX_ENTRIES_PER_KEY]:
        if isinstance(subkey, str) and isinstance(entry.value, bytes):
            yield subkey, entry.value


def _kind_of(blob: object) -> str:
    """The kind that an envelope claims: msgpack `[kind, ...]` begins with a list of four and a short text."""
    if not isinstance(blob, bytes) or len(blob) > _MAX_SEALED_RUN_BYTES or blob[:1] != b"\x94" or len(blob) < 2:
        raise BadRecord("not a sealed record")
    length = blob[1] - 0xA0
    if not 0 < length < 0x20:
        raise BadRecord("not a sealed record")
    return blob[2 : 2 + length].decode(errors="replace")


def _run_key(run: str, kind: str) -> str:
    return f"swarmtune/{run}/{kind}"
