"""Which states of the adapter can be served, named by content. Pure bookkeeping: who holds the tensors is `compute.py`.

A session is pinned to the snapshot that it began with, and a replacement host must have the very same bits; so
snapshots are found by the digests of their units, not by round numbers alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DIGEST_BYTES = 8  # enough to tell replicas apart; the full digest travels where it protects something


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """One state of all units of a span: its label in the model, its round, and a short digest per block."""

    label: str
    round: int
    digests: Mapping[int, bytes]

    def matches(self, expected: Mapping[int, bytes]) -> bool:
        """Whether every expected block is here with the same bits."""
        return all(self.digests.get(block) == digest for block, digest in expected.items())


class SnapshotShelf:
    """The newest snapshots, and older ones while a session uses them."""

    def __init__(self, *, keep: int = 2, most: int = 8) -> None:
        self._keep, self._most = keep, most
        self._snapshots: list[Snapshot] = []
        self._uses: dict[str, int] = {}

    @property
    def newest(self) -> Snapshot:
        """The snapshot of the last completed round."""
        return self._snapshots[-1]

    def add(self, snapshot: Snapshot) -> list[Snapshot]:
        """Put a new snapshot on top; returns those that nobody needs any more, to be removed from the model."""
        self._snapshots.append(snapshot)
        self._uses.setdefault(snapshot.label, 0)
        return self._trim()

    def find(self, expected: Mapping[int, bytes]) -> Snapshot | None:
        """The newest snapshot that holds exactly these digests."""
        return next((s for s in reversed(self._snapshots) if s.matches(expected)), None)

    def of_round(self, number: int) -> Snapshot | None:
        """The snapshot of one round."""
        return next((s for s in reversed(self._snapshots) if s.round == number), None)

    def has(self, label: str) -> bool:
        """Whether the snapshot is still here."""
        return label in self._uses

    def pin(self, label: str) -> None:
        """A session begins to use a snapshot."""
        self._uses[label] += 1

    def unpin(self, label: str) -> list[Snapshot]:
        """A session ended; returns what may now be removed."""
        if self._uses.get(label, 0) > 0:
            self._uses[label] -= 1
        return self._trim()

    def _trim(self) -> list[Snapshot]:
        old = self._snapshots[: -self._keep]
        unused = [s for s in old if self._uses[s.label] == 0]
        # Sessions on very old snapshots lose them rather than memory growing with every round.
        crowded = [s for s in old if s not in unused][: max(0, len(self._snapshots) - len(unused) - self._most)]
        gone = unused + crowded
        self._snapshots = [s for s in self._snapshots if s not in gone]
        for snapshot in gone:
            del self._uses[snapshot.label]
        return gone
