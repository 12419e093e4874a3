"""How much of a run's total nobody has brought yet, by what its hosts say of their progress. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from peers.records import ProgressRecord


def samples_done(records: Sequence[ProgressRecord], num_blocks: int) -> int:
    """Samples that the run has learnt from: of all blocks that anybody holds, the one that has seen fewest counts.

    A block has seen what its rounds have averaged, and what each holder that stands at the newest of them has counted
    since: every sample passes one holder of each block. Those at older rounds will take the newest state instead.
    """
    done = []
    for block in range(num_blocks):
        holders = [record for record in records if block in record.span]
        newest = max((record.round for record in holders), default=0)
        current = [record for record in holders if record.round == newest]
        if current:
            averaged = max(record.total_samples - record.samples for record in current)
            done.append(max(0, averaged) + sum(record.samples for record in current))
    return min(done, default=0)


def missing_steps(*, done: int, total: int, batch_size: int) -> int:
    """Whole batches that take a run from `done` samples to its `total`; 0 where it has them."""
    return -(-max(0, total - done) // batch_size)
