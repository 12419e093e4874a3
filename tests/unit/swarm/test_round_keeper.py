"""What a host does around its rounds: when it writes a checkpoint, what it remembers of them, and what it tells."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from averaging.averager import RoundOutcome
from averaging.config import AveragingConfig
from averaging.grouping import Meeting
from averaging.rounds import Moment
from blocks.spans import Span
from blocks.training.ledger import Counted
from peers.network import PeerId
from peers.records import ProgressRecord
from peers.routes.health import Health
from swarm.errors import BadCheckpoint
from swarm.units.book import RoundResult
from swarm.units.company import Surroundings
from swarm.units.progress import LIFE_SECONDS, ProgressTeller
from swarm.units.rounds import KeeperConfig, RoundKeeper
from tests.fakes import RUN, FakeDirectory, fake_peer_id
from tests.unit.swarm.kept_hosts import FakeHost, KeptStore, trained, unit

ME, ANN = fake_peer_id("me"), fake_peer_id("ann")
MOMENT = Moment(begin_at=0.0, window=1.0)


class Clock:
    """DHT time."""

    now = 1e6

    def __call__(self) -> float:
        return self.now


@dataclass(kw_only=True)
class Host(FakeHost):
    """As FakeHost, and goes through rounds; `saved` are those with which it wrote its checkpoint."""

    saved: list[int] = field(default_factory=list)
    noted: Mapping[int, int] = field(default_factory=dict)
    full: bool = False

    def note_swarm_samples(self, samples_by_block: Mapping[int, int]) -> None:
        self.noted = samples_by_block

    async def read_inputs(self) -> dict[str, object]:
        return {}

    @asynccontextmanager
    async def in_round(self) -> AsyncIterator[None]:
        yield

    async def apply(self, result: RoundResult) -> None:
        self.round = result.number

    async def checkpoint(self) -> None:
        if self.full:
            raise BadCheckpoint("the disk is full")
        self.saved.append(self.round)


class Averager:
    """Says of each round what `outcome` says."""

    outcome = RoundOutcome(number=0, peers=(ME,))

    async def run_round(self, number: int, *args: object, **options: object) -> RoundOutcome:
        return replace(self.outcome, number=number)

    def withdraw(self, units: object) -> None:
        pass


class Around:
    """A host, its round keeper and what they see."""

    def __init__(self, root: Path, **config: object) -> None:
        self.clock, self.averager = Clock(), Averager()
        kept = KeptStore(root, run=RUN, layout="l", most_bytes=0)
        self.host = Host(name=ME, span=Span(2, 4), kept=kept, round=0)
        self.host.units = {unit(2): trained(2, 0), unit(3): trained(3, 0)}
        self.host.rules.run = RUN
        self.directory = FakeDirectory(self.clock)
        self.surroundings = Surroundings(
            directory=self.directory,
            pool=SimpleNamespace(me=ME),  # type: ignore[arg-type]
            dht_time=self.clock,
            router=SimpleNamespace(health=Health(self.clock)),  # type: ignore[arg-type]
        )
        settings = KeeperConfig(whole=Span(0, 4), averaging=AveragingConfig(), **config)  # type: ignore[arg-type]
        self.keeper = RoundKeeper(self.host, self.averager, self.surroundings, settings)  # type: ignore[arg-type]

    async def rounds(self, *numbers: int) -> None:
        meeting = Meeting(label="", members=frozenset({ME}), is_mixing=False)
        for number in numbers:
            await self.keeper.average(number, MOMENT, [], meeting)

    async def told(self) -> ProgressRecord:
        (found,) = await self.directory.find_progress(RUN, Span(0, 4))
        return found


async def test_of_k_rounds_one_is_saved_though_the_kth_was_missed_or_the_disk_was_full(tmp_path: Path) -> None:
    around = Around(tmp_path, checkpoint_rounds=3)
    await around.rounds(1, 2, 3, 4, 5)
    assert around.host.saved == [3]
    await around.rounds(7)  # the 6th was fetched from others
    assert around.host.saved == [3, 7]
    await around.rounds(8)
    around.host.full = True
    await around.rounds(9)
    around.host.full = False
    await around.rounds(10, 11)
    assert around.host.saved == [3, 7, 10]


async def test_a_round_whose_end_is_not_known_here_is_remembered(tmp_path: Path) -> None:
    around = Around(tmp_path)
    around.averager.outcome = RoundOutcome(number=0, peers=(ME, ANN), kept={unit(2): f"no vote from {ANN}"})
    await around.rounds(1)
    assert around.keeper._catching_up._own_work.staying([unit(2), unit(3)]) == {unit(3)}


@pytest.mark.parametrize("jump", [-3600.0, 3000.0])
async def test_a_clock_that_jumps_does_not_keep_a_host_from_telling_how_far_it_is(tmp_path: Path, jump: float) -> None:
    around = Around(tmp_path)
    teller = ProgressTeller(around.host, around.surroundings)  # type: ignore[arg-type]
    await teller.tell()
    assert (await around.told()).expires_at == around.clock.now + LIFE_SECONDS
    around.clock.now += jump
    around.directory._entries.clear()  # as at who has not the record that is dated by the clock of before
    await teller.tell()
    assert (await around.told()).expires_at == around.clock.now + LIFE_SECONDS


async def test_what_is_the_same_is_not_told_again_at_once(tmp_path: Path) -> None:
    around = Around(tmp_path)
    teller = ProgressTeller(around.host, around.surroundings)  # type: ignore[arg-type]
    await teller.tell()
    before = await around.told()
    around.clock.now += LIFE_SECONDS / 2 - 1
    await teller.tell()
    assert await around.told() == before
    assert PeerId(before.peer) == ME


async def test_one_peers_claim_of_samples_since_a_round_does_not_end_the_schedule(tmp_path: Path) -> None:
    around = Around(tmp_path)
    around.host.work = {unit(2): Counted(samples=5), unit(3): Counted(samples=5)}
    a_round = 64 * AveragingConfig().round_samples
    for samples, counted in ((7, 7), (a_round, a_round), (2**53, a_round)):
        record = replace(around.host.record(), run=RUN, peer=ANN, samples=samples, total_samples=samples)
        around.keeper._note_samples([record])
        assert around.host.noted == {2: 9 + 5 + counted, 3: 9 + 5 + counted}
