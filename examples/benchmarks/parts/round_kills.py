"""A peer is killed while it reduces with others: how long until the others' next round is done."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from parts.children import Child, moment
from parts.round_peers import LEAD_SECONDS, REDUCING, Crew, Played, row_of

_INTO_THE_REDUCE_SECONDS = 0.05
_ATTEMPTS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Kill:
    """Both in seconds after the kill: the last survivor gave its round up; all had the next one's result."""

    failed_seconds: float
    recovered_seconds: float


def measure_kill(crew: Crew, survivors: Sequence[Child], victim: Child) -> Kill:
    """Kill `victim` within its all-reduce; then the survivors begin the next round at once, and it must succeed."""
    everybody = [*survivors, victim]
    play = replace(crew.next(len(everybody), moment(LEAD_SECONDS)), tell=True)
    for peer in everybody:
        peer.send(play)
    if (said := victim.receive()) != REDUCING:
        raise SystemExit(f"the round ended before anybody was killed: {said}")
    time.sleep(_INTO_THE_REDUCE_SECONDS)
    victim.kill()
    killed_at = time.time()
    lost = [_outcome(peer) for peer in survivors]
    failed_at = time.time()
    if any(each.applied for each in lost):
        raise SystemExit(f"a round without one of its peers was applied: {[each.applied for each in lost]} units")
    for _ in range(_ATTEMPTS):
        play = crew.next(len(survivors), time.time())
        for peer in survivors:
            peer.send(play)
        if row_of([peer.receive() for peer in survivors]).whole:
            return Kill(failed_seconds=failed_at - killed_at, recovered_seconds=time.time() - killed_at)
    raise SystemExit(f"no round succeeded within {_ATTEMPTS} attempts after a kill")


def _outcome(peer: Child) -> Played:
    while (said := peer.receive()) == REDUCING:
        pass
    assert isinstance(said, Played)
    return said
