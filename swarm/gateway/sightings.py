"""What one swarm looked like while the gateway watched: who came and went, and how it learnt. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from peers.records import PeerRecord
from swarm.reports.status import Status

MAX_EVENTS = 60
MAX_POINTS = 600


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

    def look(self, status: Status, unserved: tuple[int, ...], now: float) -> None:
        """Take one more look."""
        before, self.status, self.unserved, self.looked_at = self.status, status, unserved, now
        if before is not None:
            self._compare(before, status, now)
        self.points.append(_point(status, now))

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

    def _note(self, what: str, record: PeerRecord, now: float) -> None:
        blocks = (record.span.start, record.span.end)
        self.events.append(Coming(at=now, what=what, peer=record.peer, nickname=record.nickname, blocks=blocks))


def _hosts(status: Status) -> dict[str, PeerRecord]:
    return {record.peer: record for record in status.hosts}


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
