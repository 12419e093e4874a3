"""What is remembered of a swarm: comings and goings, and how the run learnt."""

from __future__ import annotations

from dataclasses import replace

from blocks.spans import Span
from peers.network import PeerId
from peers.records import PeerRecord, TrainerRecord
from swarm.gateway import sightings
from swarm.gateway.sightings import Sightings
from swarm.reports.status import Status

ANN, BOB = (PeerId("Qm" + letter * 44) for letter in "ab")
FRONT, BACK = Span(0, 3), Span(3, 6)


def host(peer: PeerId, span: Span = FRONT, **more: object) -> PeerRecord:
    record = PeerRecord(
        run="tales",
        peer=peer,
        span=span,
        tokens_per_second=1.0,
        backward_tokens_per_second=1.0,
        queue_seconds=0.0,
        round=0,
        cache_free_bytes=0,
        addresses=(),
        protocol=(1, 1),
        software="x",
        dtype="float32",
        expires_at=9.0,
    )
    return replace(record, **more)


def trainer(loss: float, eval_loss: float | None) -> TrainerRecord:
    return TrainerRecord(
        run="tales", peer=ANN, loss=loss, eval_loss=eval_loss, tokens_per_second=5.0, step=1, round=1, expires_at=9.0
    )


def status(*hosts: PeerRecord, **more: object) -> Status:
    base = Status(run="r", name="tales", num_blocks=6, hosts=hosts, progress={}, trainers=())
    return replace(base, **more)


def seen(*looks: Status) -> Sightings:
    found = Sightings()
    for second, look in enumerate(looks):
        found.look(look, (), float(second))
    return found


def test_who_comes_goes_moves_and_pauses_is_told_newest_first() -> None:
    ann, bob = host(ANN, nickname="ann"), host(BOB, BACK)
    found = seen(
        status(ann),
        status(ann, bob),
        status(host(ANN, BACK, nickname="ann"), bob),
        status(bob, paused=(host(ANN, BACK, away="hand"),)),
        status(),
        status(),
    )
    events = found.plain()["events"]
    assert isinstance(events, list)
    assert [(event["at"], event["what"], event["peer"], event["blocks"]) for event in events] == [
        (4.0, "left", BOB, [3, 6]),
        (3.0, "paused", ANN, [3, 6]),
        (2.0, "moved", ANN, [3, 6]),
        (1.0, "joined", BOB, [3, 6]),
    ], "those who were there at the first look did not come"
    assert [event["nickname"] for event in events] == ["", "ann", "ann", ""]


def test_the_curve_is_of_the_trainers_and_thinned_for_the_page() -> None:
    found = seen(status(trainers=(trainer(2.0, None), trainer(3.0, 4.0))), status())
    assert (found.points[0].loss, found.points[0].eval_loss, found.points[0].tokens_per_second) == (2.5, 4.0, 10.0)
    assert (found.points[1].loss, found.points[1].eval_loss) == (None, None)
    long = seen(*(status() for _ in range(500)))
    points = long.plain()["points"]
    assert isinstance(points, list)
    assert len(points) <= 200
    assert points[-1][0] == 499.0, "the newest is always shown"
    assert [point[0] for point in points] == sorted(point[0] for point in points)


def test_what_is_remembered_is_bounded() -> None:
    found = Sightings()
    for number in range(200):
        name = PeerId(f"Qm{number:044}")
        found.look(status(host(name)), (), float(number))
    assert len(found.events) == sightings.MAX_EVENTS
    assert Sightings().plain() == {"looked_at": None}
