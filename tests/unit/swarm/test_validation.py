"""Everybody's sums of held-out rows: told, awaited, checked by name, and added up to the same by all."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from peers.network import PeerId
from peers.records import EvaluationRecord, TrainerRecord, check_record
from swarm.reports.metrics import Value
from swarm.training import sums_of_all, validation
from swarm.training.best_adapter import BEST, BestAdapter, read_best
from swarm.training.evaluation_sums import LabelSums, Sums, label_sums, pack
from swarm.training.sums_of_all import sums_of
from swarm.training.trainer import SwarmView
from swarm.training.validation import Validation
from tests.fakes import RUN, FakeDirectory, fake_peer_id

ANN, BOB, CEM = (fake_peer_id(name) for name in ("ann", "bob", "cem"))
SET = b"12345678"
SECONDS = 20.0


class CountingDirectory(FakeDirectory):
    """Counts how often somebody looked for sums."""

    reads = 0

    async def find_evaluations(self, run: str, number: int) -> list[EvaluationRecord]:
        self.reads += 1
        return await super().find_evaluations(run, number)

    async def read_often(self) -> None:
        """All who look have looked again, some times."""
        most = self.reads + 20
        await until(lambda: self.reads >= most)


@dataclass(kw_only=True)
class World:
    """A run as trainers see it: what its round is, and whether all hosts stand there."""

    round: int = 1
    settled: bool = True
    now: float = 1000.0
    directory: CountingDirectory = field(init=False)

    def __post_init__(self) -> None:
        self.directory = CountingDirectory(clock=lambda: self.now)

    def view(self, me: PeerId) -> SwarmView:
        async def refresh() -> None:
            if not self.settled:
                self.now += 1.0

        return SwarmView(
            me=me,
            run=RUN,
            directory=self.directory,
            round=lambda: self.round,
            is_settled=lambda number: self.settled,
            refresh=refresh,
            num_peers=lambda: 2,
            dht_time=lambda: self.now,
        )


def says(peer: PeerId, evaluated: int | None, world: World) -> TrainerRecord:
    """How a trainer stands."""
    return TrainerRecord(
        run=RUN,
        peer=peer,
        loss=1.0,
        tokens_per_second=1.0,
        step=1,
        round=world.round,
        evaluated=evaluated,
        expires_at=world.now + 60,
    )


class Trainer:
    """One that measures `sums` of whatever round."""

    def __init__(self, world: World, me: PeerId, sums: Sums, directory: Path) -> None:
        self.world, self.me, self.sums = world, me, sums
        self.asked: list[int] = []
        self.notes: list[tuple[str, dict[str, Value]]] = []
        self.during: Callable[[], None] = lambda: None
        self.best = directory / str(me) / BEST
        self.best.parent.mkdir()
        self.validation = Validation(
            self.measure,
            world.view(me),
            BestAdapter(self.best, self.export),
            lambda kind, values: self.notes.append((kind, dict(values))),
        )

    async def measure(self, number: int) -> Sums:
        self.asked.append(number)
        self.during()
        return self.sums

    async def export(self, directory: Path) -> int:
        self._write(directory)
        return self.world.round

    def _write(self, directory: Path) -> None:
        directory.mkdir()
        (directory / "adapter_config.json").write_text("{}")

    async def say(self) -> None:
        """Tell the swarm how this trainer stands, as after a step."""
        self.world.now += 0.01  # the directory keeps what expires last
        await self.world.directory.publish(says(self.me, self.validation.announced, self.world))

    async def finish(self) -> None:
        async with asyncio.timeout(SECONDS):
            await self.validation.finish(SECONDS)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(sums_of_all, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(validation, "_SETTLE_POLL_SECONDS", 0.001)
    return World()


def rows(count: int, seed: int) -> LabelSums:
    dice = np.random.default_rng(seed)
    return label_sums(dice.normal(size=(count, 2)), dice.integers(0, 2, count))


def plain(loss: float, tokens: int) -> Sums:
    return Sums(loss=loss, tokens=tokens)


def record_of(peer: PeerId, sums: Sums, *, number: int = 1, **changes: object) -> EvaluationRecord:
    record = EvaluationRecord(
        run=RUN,
        peer=peer,
        round=number,
        loss=sums.loss,
        tokens=sums.tokens,
        label_set=sums.label_set,
        labels=b"" if sums.labels is None else pack(sums.labels),
        expires_at=1600.0,
    )
    return replace(record, **changes)  # type: ignore[arg-type]


async def test_two_trainers_come_to_the_same_sum(world: World, tmp_path: Path) -> None:
    ann = Trainer(world, ANN, Sums(loss=30.0, tokens=10, labels=rows(10, 1), label_set=SET), tmp_path)
    bob = Trainer(world, BOB, Sums(loss=10.0, tokens=30, labels=rows(20, 2), label_set=SET), tmp_path)
    world.round = 0
    for trainer in (ann, bob):
        await trainer.validation.measure()
        await trainer.finish()
        await trainer.say()
    world.round = 1
    for trainer in (ann, bob):
        assert trainer.validation.is_due()
        await trainer.validation.measure()
        assert not trainer.validation.is_due()
    for trainer in (ann, bob):
        await trainer.finish()
        await trainer.validation.close()
    assert ann.asked == bob.asked == [0, 1]
    assert [found.loss for found in ann.validation.own] == [3.0, 3.0]
    assert ann.validation.summed[1] == bob.validation.summed[1]
    found = ann.validation.summed[1]
    assert (found.round, found.loss, found.tokens, found.peers) == (1, 1.0, 40, 2)
    assert found.scores is not None
    assert found.scores.rows == 30
    kind, numbers = ann.notes[-1]
    assert kind == "swarm_evaluation"
    assert (numbers["round"], numbers["loss"], numbers["peers"], numbers["rows"]) == (1, 1.0, 2, 30)
    assert numbers["accuracy"] == found.scores.accuracy
    for trainer in (ann, bob):
        best = read_best(trainer.best)
        assert best is not None
        assert (best.round, best.loss) == (1, 1.0)
        assert best.parts == {str(ANN): (30.0, 10), str(BOB): (10.0, 30)}


async def test_who_measures_is_waited_for_until_it_is_gone_or_says_that_it_ends(world: World, tmp_path: Path) -> None:
    ann, bob = (Trainer(world, me, plain(10.0, 10), tmp_path) for me in (ANN, BOB))
    await bob.validation.measure()
    await bob.finish()
    await bob.say()
    for world.round in (2, 3):
        await ann.validation.measure()
    await world.directory.read_often()
    assert not ann.validation.summed, "Bob may measure rounds 2 and 3 yet"
    world.round = 2
    await bob.validation.measure()
    await bob.say()
    await until(lambda: len(ann.validation.summed) == 1)
    assert (ann.validation.summed[0].round, ann.validation.summed[0].peers) == (2, 2)
    bob.validation.end()
    await bob.say()
    await ann.finish()
    assert (ann.validation.summed[1].round, ann.validation.summed[1].peers) == (3, 1)
    await bob.finish()
    for trainer in (ann, bob):
        await trainer.validation.close()


async def test_a_round_that_others_have_passed_over_is_not_waited_for(world: World, tmp_path: Path) -> None:
    ann, bob = (Trainer(world, me, plain(10.0, 10), tmp_path) for me in (ANN, BOB))
    world.round = 3
    await bob.validation.measure()
    await bob.say()
    world.round = 2
    await ann.validation.measure()
    await ann.finish()
    assert [found.peers for found in ann.validation.summed] == [1]
    await bob.finish()


async def test_sums_are_given_up_for_newer_ones_and_in_the_end(world: World, tmp_path: Path) -> None:
    ann, bob = (Trainer(world, me, plain(10.0, 10), tmp_path) for me in (ANN, BOB))
    await bob.validation.measure()
    await bob.finish()
    await bob.say()
    for world.round in range(2, 7):
        await ann.validation.measure()
    await until(lambda: len(ann.validation.summed) == 1)
    assert ann.validation.summed[0].round == 2
    world.now += 50  # Bob's record lives on
    await world.directory.read_often()
    assert len(ann.validation.summed) == 1
    world.now += 11
    await ann.finish()
    assert [found.round for found in ann.validation.summed] == [2, 3, 4, 5, 6]


async def test_close_ends_what_waits(world: World, tmp_path: Path) -> None:
    ann, bob = (Trainer(world, me, plain(10.0, 10), tmp_path) for me in (ANN, BOB))
    await bob.validation.measure()
    await bob.finish()
    await bob.say()
    world.round = 2
    await ann.validation.measure()
    await ann.validation.finish(0.05)
    await ann.validation.close()
    assert not ann.validation.summed
    assert read_best(ann.best) is None
    assert [path.name for path in ann.best.parent.iterdir()] == []


async def test_who_has_measured_a_round_is_waited_for_until_its_sums_are_there(world: World, tmp_path: Path) -> None:
    await world.directory.publish(says(BOB, 1, world))
    ann = Trainer(world, ANN, plain(10.0, 10), tmp_path)
    await ann.validation.measure()
    await world.directory.read_often()
    assert not ann.validation.summed
    await world.directory.publish(record_of(BOB, plain(30.0, 10)))
    await ann.finish()
    assert [found.loss for found in ann.validation.summed] == [2.0]


async def test_a_round_is_measured_once(world: World, tmp_path: Path) -> None:
    ann = Trainer(world, ANN, plain(10.0, 10), tmp_path)
    for _ in range(2):
        await ann.validation.measure()
        await ann.finish()
    assert ann.asked == [1]
    assert len(ann.validation.summed) == 1


BAD = {
    "a loss of -10": {"loss": -10.0},
    "a loss of 1e\\+15": {"loss": 1e15},
    "20 rows with a label in 5 tokens": {"tokens": 5},
    "1000000000000 tokens": {"tokens": 10**12},
    "counts of 97 labels": {"labels": b"abc"},
    "0 bytes of counts": {"labels": b""},
    "counts of 3 labels under the name of others, which are 2": {
        "labels": pack(label_sums(np.zeros((20, 3)), np.zeros(20, dtype=np.int64)))
    },
}


@pytest.mark.parametrize("reason", BAD)
async def test_false_sums_are_refused_by_name_and_the_others_go_on(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    good = Sums(loss=20.0, tokens=20, labels=rows(20, 1), label_set=SET)
    await world.directory.publish(record_of(CEM, good, **BAD[reason]))
    await world.directory.publish(says(CEM, 1, world))
    await world.directory.publish(record_of(BOB, good))
    ann = Trainer(world, ANN, good, tmp_path)
    await ann.validation.measure()
    await ann.finish()
    (found,) = ann.validation.summed
    assert (found.peers, found.loss, found.tokens) == (2, 1.0, 40)
    assert found.scores is not None
    assert found.scores.rows == 40
    (line,) = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert line.startswith(f"the sums of peer {CEM} for round 1 are refused: ")
    with pytest.raises(ValueError, match=reason):
        sums_of(record_of(CEM, good, **BAD[reason]), good)


@pytest.mark.parametrize("changes", [{"loss": math.nan}, {"loss": math.inf}, {"tokens": -1}, {"labels": bytes(3001)}])
def test_what_is_no_number_or_too_large_is_no_record(changes: dict[str, object]) -> None:
    check_record(record_of(CEM, plain(1.0, 1)))
    with pytest.raises(Exception, match="evaluation record: field"):
        check_record(record_of(CEM, plain(1.0, 1), **changes))


async def test_rows_with_labels_of_others_count_for_the_loss_alone(world: World, tmp_path: Path) -> None:
    theirs = Sums(loss=60.0, tokens=20, labels=rows(20, 1), label_set=b"87654321")
    await world.directory.publish(record_of(BOB, theirs))
    ann = Trainer(world, ANN, Sums(loss=20.0, tokens=20, labels=rows(10, 1), label_set=SET), tmp_path)
    await ann.validation.measure()
    await ann.finish()
    (found,) = ann.validation.summed
    assert (found.peers, found.loss) == (2, 2.0)
    assert found.scores is not None
    assert found.scores.rows == 10


async def test_what_was_measured_while_hosts_stood_apart_is_not_told(world: World, tmp_path: Path) -> None:
    ann = Trainer(world, ANN, plain(10.0, 10), tmp_path)
    world.settled = False
    await ann.validation.measure()
    assert len(ann.validation.own) == 1
    assert not ann.validation.is_due(), "it is not tried again before each step"
    assert ann.validation.announced is None
    world.settled = True
    await ann.validation.measure()
    assert ann.validation.announced == 1
    await ann.finish()

    def three_rounds() -> None:
        world.round += 3

    ann.during = three_rounds
    world.round = 2
    await ann.validation.measure()
    assert ann.validation.announced == 1, "a host may have had the adapter of round 2 no more"
    assert len(await world.directory.find_evaluations(RUN, 1)) == 1
    assert not await world.directory.find_evaluations(RUN, 2)


async def test_a_loss_that_exploded_is_shown_and_not_told(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    ann = Trainer(world, ANN, plain(math.nan, 10), tmp_path)
    await ann.validation.measure()
    await ann.finish()
    assert math.isnan(ann.validation.own[0].loss)
    assert "is not told to the others: a loss of nan on 10 tokens" in caplog.text
    assert not await world.directory.find_evaluations(RUN, 1)


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not happened():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
