"""What one swarm looked like while the gateway watched: who came and went, who did what, how it learnt. Pure."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass

from peers.network import PeerId
from peers.records import PeerRecord
from swarm.reports.status import Status

MAX_EVENTS = 60
MAX_POINTS = 600
_MAX_NAMES = 4096  # of peers that are remembered, so that many who come and go cannot fill the memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Coming:
    """A peer came, went, paused, or took other blocks, at a Unix time."""

    at: float
    what: str
    peer: str
    nickname: str
    blocks: tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """How the run stood at a Unix time. Losses are means over the trainers that announce one."""

    at: float
    round: int
    loss: float | None
    eval_loss: float | None
    tokens_per_second: float
    hosts: int
    bytes_sent: int


class Sightings:
    """Looks at one run, oldest first."""

    def __init__(self) -> None:
        self.status: Status | None = None
        self.unserved: tuple[int, ...] = ()
        self.looked_at = 0.0
        self.events: deque[Coming] = deque(maxlen=MAX_EVENTS)
        self.points: deque[Point] = deque(maxlen=MAX_POINTS)
        self.samples: Counter[str] = Counter()
        """By host: samples that it has trained since the gateway began to watch."""
        self.served: Counter[str] = Counter()
        """By host: tokens of this gateway's texts, prompts included, that went through it."""

    def look(self, status: Status, unserved: tuple[int, ...], now: float) -> None:
        """Take one more look."""
        before, self.status, self.unserved, self.looked_at = self.status, status, unserved, now
        if before is not None:
            self._compare(before, status, now)
        self.points.append(_point(status, now))

    def wrote(self, hosts: tuple[PeerId, ...], tokens: int) -> None:
        """A text of the gateway went through `hosts`; those of other swarms are left out."""
        ours = () if self.status is None else {record.peer for record in self.status.hosts}
        _count(self.served, {host: tokens for host in hosts if host in ours})

    def plain(self) -> dict[str, object]:
        """For JSON; the points thinned to what a plot shows."""
        status = self.status
        if status is None:
            return {"looked_at": None}
        every = -(-len(self.points) // 200) or 1
        points = list(self.points)
        shown = points[::-every][::-1]
        return {
            **status.to_plain(),
            "looked_at": self.looked_at,
            "unserved_blocks": list(self.unserved),
            "events": [_event(event) for event in reversed(self.events)],
            "points": [[p.at, p.round, p.loss, p.eval_loss, p.tokens_per_second, p.hosts, p.bytes_sent] for p in shown],
            "trained_samples": dict(self.samples),
            "served_tokens": dict(self.served),
        }

    def _compare(self, before: Status, after: Status, now: float) -> None:
        was, now_there = _hosts(before), _hosts(after)
        paused = {record.peer for record in after.paused}
        for peer, record in now_there.items():
            if peer not in was:
                self._note("joined", record, now)
            elif record.span != was[peer].span:
                self._note("moved", record, now)
        for peer, record in was.items():
            if peer not in now_there:
                self._note("paused" if peer in paused else "left", record, now)
        grown: dict[str, int] = {}
        for name, progress in after.progress.items():
            old = before.progress.get(name)
            if old is not None:
                since = old.samples if old.round == progress.round else 0
                grown[name] = max(0, progress.samples - since)
        _count(self.samples, grown)

    def _note(self, what: str, record: PeerRecord, now: float) -> None:
        blocks = (record.span.start, record.span.end)
        self.events.append(Coming(at=now, what=what, peer=record.peer, nickname=record.nickname, blocks=blocks))


def _hosts(status: Status) -> dict[str, PeerRecord]:
    return {record.peer: record for record in status.hosts}


def _count(counter: Counter[str], more: Mapping[str, int]) -> None:
    for name, number in more.items():
        if number and (name in counter or len(counter) < _MAX_NAMES):
            counter[name] += number


def _point(status: Status, now: float) -> Point:
    losses = [trainer.loss for trainer in status.trainers]
    evals = [trainer.eval_loss for trainer in status.trainers if trainer.eval_loss is not None]
    return Point(
        at=round(now, 1),
        round=status.round,
        loss=round(sum(losses) / len(losses), 4) if losses else None,
        eval_loss=round(sum(evals) / len(evals), 4) if evals else None,
        tokens_per_second=round(status.tokens_per_second, 1),
        hosts=len(status.hosts),
        bytes_sent=sum(count.sent for counts in status.traffic.values() for count in counts),
    )


def _event(event: Coming) -> dict[str, object]:
    return {
        "at": event.at,
        "what": event.what,
        "peer": event.peer,
        "nickname": event.nickname,
        "blocks": list(event.blocks),
    }
