"""What a peer's own work shows of hosts counts for more than their own word, while it is fresh."""

from __future__ import annotations

from blocks.spans import Span
from peers.chains.timings import arrived, note, told
from peers.network import PeerId
from peers.routes import paces as module
from peers.routes.paces import FRESH_SECONDS, Paces
from peers.routes.routing import Hop, HostView
from peers.streams.calls import Answer
from peers.streams.messages import Broken, Done
from peers.streams.values import MAX_SECONDS, Place, Timing

ANN = Hop(peer=PeerId("ann"), span=Span(0, 4))
VIEW = HostView(peer=ANN.peer, span=Span(0, 8), tokens_per_second=100.0, queue_seconds=5.0, rtt_seconds=0.05)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_measured_speed_replaces_the_announced_one_until_it_is_old() -> None:
    clock = Clock()
    paces = Paces(clock)
    assert paces.seen(VIEW) == VIEW
    paces.measured(ANN, 100, 2.0, 0.001)  # 4 blocks x 100 tokens in 2 s: 25 tokens/s through its 8 blocks
    seen = paces.seen(VIEW)
    assert abs(seen.tokens_per_second - 25.0) < 1e-6
    assert (seen.queue_seconds, seen.rtt_seconds) == (0.0, 0.001)
    clock.now = FRESH_SECONDS
    assert paces.seen(VIEW) == VIEW


def test_steps_and_long_passes_are_measured_apart() -> None:
    paces = Paces(Clock())
    paces.measured(ANN, 1, 0.4, 0.0)
    seen = paces.seen(VIEW)
    assert seen.step_seconds == 0.1
    assert seen.tokens_per_second == 100.0
    assert abs(seen.seconds_for(Span(0, 2), 1) - 0.2) < 1e-9


def test_a_host_that_slows_down_is_seen_to_in_a_few_measurements() -> None:
    paces = Paces(Clock())
    for _ in range(5):
        paces.measured(ANN, 100, 1.0, 0.0)
    before = paces.seen(VIEW).tokens_per_second
    for _ in range(5):
        paces.measured(ANN, 100, 10.0, 0.0)
    assert paces.seen(VIEW).tokens_per_second < before / 5


def test_work_that_is_with_a_host_counts_and_ends() -> None:
    paces = Paces(Clock())
    with paces.working([ANN]), paces.working([ANN]):
        assert paces.seen(VIEW).working == 8, "blocks"
        assert paces.seen(VIEW).seconds_for(Span(0, 8), 100) == 0.05 + 5.0 + 2 * 1.0
        paces.measured(ANN, 100, 4.0, 0.0)  # of two pieces of ours, one waited for the other
        assert abs(paces.seen(VIEW).tokens_per_second - 25.0) < 1e-6
    assert paces.seen(VIEW).working == 0


def test_the_number_of_hosts_is_bounded() -> None:
    paces = Paces(Clock())
    for number in range(module.MAX_PEERS + 10):
        paces.measured(Hop(peer=PeerId(str(number)), span=Span(0, 1)), 1, 1.0, 0.0)
    assert len(paces._paces) == module.MAX_PEERS


def test_timings_of_a_chain_come_back_through_it() -> None:
    last = told(Answer(), "c", 3.0)
    middle = told(Answer(message=Done(timings=arrived(last, 3.5))), "b", 2.0)
    first = arrived(middle, 7.0)
    assert first == (Timing("b", 2.0, 1.5), Timing("c", 3.0, 0.5))
    paces = Paces(Clock())
    note(paces, first, {"b": ANN, "x": ANN}, 1)
    assert paces.seen(VIEW).step_seconds == 0.5


def test_timings_that_cannot_be_are_bounded_and_a_broken_chain_tells_none() -> None:
    broken = Answer(message=Broken(place=Place(ANN.peer, "a"), is_lost=True, code="", reason=""))
    assert told(broken, "b", 1.0) is broken
    assert arrived(broken, 1.0) == ()
    assert arrived(told(Answer(), "b", 9.0), 1.0) == (Timing("b", 9.0, 0.0),)
    assert arrived(told(Answer(), "b", 1e9), 1e9)[0].seconds == MAX_SECONDS
