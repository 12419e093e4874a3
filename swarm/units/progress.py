"""What a host tells the swarm about its progress, and how a reader takes it."""

from __future__ import annotations

from averaging.rounds import Moment, PeerProgress
from peers.records import Keeping, ProgressRecord, Proposal
from peers.units.keeping import Copy, told
from swarm.units.company import Surroundings
from swarm.units.holder import Holder

LIFE_SECONDS = 60.0
_BETWEEN_SECONDS = 1.0


class ProgressTeller:
    """Publishes one host's progress: on change, at most once a second, and before the last word expires."""

    def __init__(self, host: Holder, around: Surroundings) -> None:
        self.proposal: Proposal | None = None
        self.away = ""
        self._host, self._around = host, around
        self._told: tuple[int, int, Proposal | None, str, tuple[Keeping, ...]] | None = None
        self._told_at = float("-inf")

    def own(self) -> PeerProgress:
        """This host's own entry among all."""
        number = self._host.round + 1
        return PeerProgress(
            peer=self._around.pool.me, number=number, samples=self._samples(), moment=_moment(self.proposal, number)
        )

    async def tell(self) -> None:
        """Publish if there is something to say and it is time to. What others wait for goes out at once."""
        say = (self._host.round, self._samples(), self.proposal, self.away, self._keeps())
        now = self._around.dht_time()
        age = abs(now - self._told_at)  # a clock that was set back says as little of what the others still have
        urgent = self._told is None or (say[0], *say[2:4]) != (self._told[0], *self._told[2:4])
        fresh = say == self._told or age < _BETWEEN_SECONDS
        if not urgent and fresh and age < LIFE_SECONDS / 2:
            return
        self._told, self._told_at = say, now
        record = ProgressRecord(
            run=self._host.rules.run,
            peer=self._around.pool.me,
            span=self._host.span,
            round=say[0],
            samples=say[1],
            total_samples=self._host.total_samples(),
            digests=b"".join(digest for _, digest in sorted(self._host.digests().items())),
            proposal=say[2],
            away=say[3],
            behind_nat=self._around.behind_nat,
            keeps=say[4],
            expires_at=now + LIFE_SECONDS,
        )
        await self._around.directory.publish(record)

    def _keeps(self) -> tuple[Keeping, ...]:
        units = self._host.kept.units
        copies = {unit: Copy(round=kept.version[0], digest=kept.version[2]) for unit, kept in units.items()}
        return told(copies, self._host.span)

    def _samples(self) -> int:
        return max((counted.samples for counted in self._host.counted().values()), default=0)


def progress_of(record: ProgressRecord) -> PeerProgress:
    """A record as the rules of rounds take it: a peer that has done `round` rounds works towards the next."""
    number = record.round + 1
    return PeerProgress(
        peer=record.peer, number=number, samples=record.samples, moment=_moment(record.proposal, number)
    )


def _moment(proposal: Proposal | None, number: int) -> Moment | None:
    if proposal is None or proposal[0] != number:
        return None
    return Moment(begin_at=proposal[1], window=proposal[2])
