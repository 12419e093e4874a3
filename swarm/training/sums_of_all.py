"""Everybody's sums of held-out rows of a round: told, awaited, refused by name where no rows give them, and added up.

What a peer tells is signed, and so small that it goes through the directory, where trainers that only dial, come late
or are slow find it as well. Everybody adds up the same sums in the same order, and so comes to the same result, to the
bit. An all-reduce as rounds have it would need peers that can be dialled and stay, and could not refuse one peer's sums
for what they are.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping

from peers.errors import BadRecord, NetworkFailed
from peers.network import PeerId
from peers.records import EvaluationRecord
from swarm.reports.metrics import Note, Value
from swarm.training.best_adapter import Parts
from swarm.training.evaluation_sums import Evaluation, Sums, add_up, check, evaluation_of, pack, parse
from swarm.training.trainer import SwarmView

logger = logging.getLogger(__name__)

_LIFE_SECONDS = 600.0  # of a record: how late a slow trainer may read it
_MOST_SECONDS = 90.0  # more than the record of a trainer that died lives
_POLL_SECONDS = 1.0
_MOST_OPEN = 4  # rounds whose sums are waited for at a time


class SumsOfAll:
    """Tells what this peer has measured, and adds up what all have. `settle` is handed each result with its parts."""

    def __init__(self, view: SwarmView, note: Note, settle: Callable[[Evaluation, Parts], None]) -> None:
        self.summed: list[Evaluation] = []
        self._view, self._note, self._settle = view, note, settle
        self._newest = -1
        self._adding: dict[int, asyncio.Task[None]] = {}

    def begin(self, number: int, mine: Sums) -> None:
        """Add up the sums of round `number`, of which `mine` are this peer's, in a task of its own."""
        self._newest = max(self._newest, number)
        self._adding[number] = asyncio.create_task(self._add_up(number, mine), name=f"sums of round {number}")

    async def finish(self, seconds: float) -> None:
        """Wait at most so long for the others' sums."""
        if self._adding:
            done, _ = await asyncio.wait(self._adding.values(), timeout=seconds)
            for task in done:
                task.result()

    async def close(self) -> None:
        """End what still waits for others."""
        tasks = list(self._adding.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def tell(self, number: int, sums: Sums) -> bool:
        """Publish the sums; False, and said in the log, where it cannot be."""
        try:
            check(sums)
            record = EvaluationRecord(
                run=self._view.run,
                peer=self._view.me,
                round=number,
                loss=sums.loss,
                tokens=sums.tokens,
                label_set=sums.label_set,
                labels=b"" if sums.labels is None else pack(sums.labels),
                expires_at=self._view.dht_time() + _LIFE_SECONDS,
            )
            return await self._view.directory.publish(record)
        except (ValueError, BadRecord, NetworkFailed) as error:
            logger.warning("what was measured with round %d is not told to the others: %s", number, error)
            return False

    async def others(self) -> dict[PeerId, int]:
        """Who else measures, and the last round of which each has said so."""
        trainers = await self._view.directory.find_trainers(self._view.run)
        return {
            each.peer: each.evaluated for each in trainers if each.evaluated is not None and each.peer != self._view.me
        }

    async def _add_up(self, number: int, mine: Sums) -> None:
        """Wait for the sums of those who measure, as long as they may come, and add them up."""
        began, refused = self._view.dht_time(), set[PeerId]()
        found: Mapping[PeerId, Sums] = {}
        try:
            while True:
                records = await self._view.directory.find_evaluations(self._view.run, number)
                found = self._read(records, mine, refused)
                awaited = {peer for peer, last in (await self.others()).items() if last <= number}
                is_late = abs(self._view.dht_time() - began) > _MOST_SECONDS or self._newest - number >= _MOST_OPEN
                if is_late or not awaited - found.keys() - refused:
                    break
                await asyncio.sleep(_POLL_SECONDS)
        except NetworkFailed as error:
            logger.warning("the others' sums of round %d cannot be read: %s", number, error)
        self._take_sum(number, {**found, self._view.me: mine}, mine.label_set)
        del self._adding[number]

    def _take_sum(self, number: int, found: Mapping[PeerId, Sums], label_set: bytes) -> None:
        parts = {peer: found[peer] for peer in sorted(found)}  # one order for all, so that all come to the same
        result = evaluation_of(number, add_up(list(parts.values()), label_set), peers=len(parts))
        self.summed.append(result)
        self._note("swarm_evaluation", numbers_of(result) | {"peers": result.peers})
        logger.info("evaluated by all round=%d loss=%.4f peers=%d", number, result.loss, result.peers)
        self._settle(result, {str(peer): (part.loss, part.tokens) for peer, part in parts.items()})

    def _read(self, records: Iterable[EvaluationRecord], mine: Sums, refused: set[PeerId]) -> dict[PeerId, Sums]:
        """The sums that can be right. Whose cannot is named once."""
        found = {}
        for record in records:
            try:
                found[record.peer] = sums_of(record, mine)
            except ValueError as error:
                if record.peer not in refused:
                    logger.warning("the sums of peer %s for round %d are refused: %s", record.peer, record.round, error)
                refused.add(record.peer)
        return found


def sums_of(record: EvaluationRecord, mine: Sums) -> Sums:
    """What another trainer has measured. Counts of other labels than those in `mine` are left out.

    Raises:
        ValueError: no rows can give this; the message says why.
    """
    labels = parse(record.labels) if record.labels or record.label_set else None
    if labels is not None and mine.labels is not None and record.label_set == mine.label_set:
        theirs, ours = labels.counts.shape[1], mine.labels.counts.shape[1]
        if theirs != ours:
            raise ValueError(f"counts of {theirs} labels under the name of others, which are {ours}")
    sums = Sums(loss=record.loss, tokens=record.tokens, labels=labels, label_set=record.label_set)
    check(sums)
    return sums


def numbers_of(found: Evaluation) -> dict[str, Value]:
    """An evaluation in numbers."""
    numbers: dict[str, Value] = {
        "round": found.round,
        "loss": found.loss,
        "perplexity": found.perplexity,
        "tokens": found.tokens,
    }
    if found.scores is not None:
        scores = found.scores
        numbers |= {"rows": scores.rows, "accuracy": scores.accuracy, "macro_f1": scores.macro_f1}
        if scores.auc is not None:
            numbers |= {"auc": scores.auc, "auc_error": scores.auc_error}
    return numbers
