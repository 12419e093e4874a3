"""Hosts killed one after another while a trainer works, and what comes back after the worst: a block's last holder, or
everybody.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from parts.chaos_swarm import ChaosSwarm, Story
from parts.faults import Fault, FaultKind, FaultPlan
from parts.report import Bench, Values

from swarm.data.stream import SampleSet
from swarm.peer import Peer

RESTART_SECONDS = 2.0  # after a kill
_LEAST_STEPS = 6
GIVEN_UP_SECONDS = 45.0  # a last holder that nobody has replaced by then is started again


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a trainer trains on, and by what it is judged."""

    rows: SampleSet
    held_out: SampleSet


@dataclass(frozen=True, kw_only=True, slots=True)
class Churn:
    """How fast a stretch went, and the held-out loss after it."""

    steps: int
    tokens_per_second: float
    loss: float


def kills(seed: int, names: Sequence[str], every_seconds: float, count: int) -> FaultPlan:
    """One host after another, in the order of `names`; each starts again after a moment."""
    plan = FaultPlan(seed=seed)
    for number in range(count):
        name = names[(number + seed) % len(names)]
        plan = plan.add(FaultKind.KILL, name, at=number * every_seconds, seconds=RESTART_SECONDS)
    return plan


def num_steps(seconds: float, usual_step: float) -> int:
    """How many steps take about so long; enough to tell a speed even on a machine that is busy with other things."""
    return max(_LEAST_STEPS, round(seconds / usual_step))


def speed(story: Story, tokens_per_step: float) -> float:
    """Tokens/s from the end of the first step on."""
    moments = story.steps_at
    return (len(moments) - 1) * tokens_per_step / (moments[-1] - moments[0])


def train_under(swarm: ChaosSwarm, trainer: Peer, work: Work, plan: FaultPlan, steps: int) -> Churn:
    """`steps` under a plan in seconds from now on; evaluated when all hosts are back and all is averaged."""
    for fault in plan.faults:
        swarm.later.add(fault.at, lambda fault=fault: swarm.strike(fault))  # type: ignore[misc]
    story = swarm.train(trainer, steps, data=work.rows)
    swarm.later.cancel()
    bring_back(swarm)
    swarm.wait_averaged()
    loss = swarm.train(trainer, 1, data=work.rows, held_out=work.held_out).held_out[0]
    return Churn(steps=steps, tokens_per_second=speed(story, story.tokens / steps), loss=loss)


def bring_back(swarm: ChaosSwarm) -> None:
    """Every host of the layout is there and ready."""
    swarm.settled()
    for name in swarm.layout.spans:
        if not swarm.is_alive(name):
            swarm.start(name)
    swarm.wait_started()


def kill_last_holder(bench: Bench, swarm: ChaosSwarm, trainer: Peer, work: Work) -> Values:
    """The only holder of some blocks is killed; it starts again if nobody has taken its place in time."""
    swarm.train(trainer, 8, data=work.rows)
    before = swarm.wait_averaged()
    spans = {name: record.span for name, record in swarm.records().items()}
    lonely = [name for name, span in spans.items() if list(spans.values()).count(span) == 1]
    if not lonely:
        raise SystemExit(f"no host holds its blocks alone: {spans}")
    swarm.train(trainer, 1, data=work.rows)  # the round's result has had time to reach keepers
    last = Fault(kind=FaultKind.KILL, name=lonely[0], at=1, seconds=GIVEN_UP_SECONDS)
    story = swarm.train(trainer, 3, FaultPlan(seed=0, faults=(last,)), data=work.rows)
    (seconds,) = story.stalls()
    bench.say(f"last holder of blocks {spans[lonely[0]]} killed: the next step ended {seconds:.1f} s later")
    healed = seconds < GIVEN_UP_SECONDS
    if healed:
        swarm.later.cancel()
    swarm.settled()
    number = swarm.wait_averaged()
    return {
        "last_holder_seconds": round(seconds, 2),
        "last_holder_healed": healed,
        "last_holder_rounds_lost": max(0, before - number),
        "last_holder_equal": swarm.is_equal(),
    }


def kill_everybody(bench: Bench, swarm: ChaosSwarm, names: tuple[str, str], work: Work) -> Values:
    """SIGKILL for all hosts and the end of all peers; they start again from their directories alone.

    `names` are those of the trainer before and after.
    """
    stood = swarm.wait_averaged()
    swarm.train(swarm.enter(names[0]), 2, data=work.rows)  # on the way to the next round
    for name in list(swarm.peers):
        swarm.leave(name)
    for name in swarm.alive:
        swarm.kill(name)
    began = time.monotonic()
    swarm.start_all()
    resumed = min(record.round for record in swarm.records().values())
    swarm.train(swarm.enter(names[1]), 4, data=work.rows)
    number = swarm.wait_averaged()
    seconds = time.monotonic() - began
    bench.say(
        f"everybody killed at round {stood} or later, resumed at {resumed}, equal at {number} after {seconds:.1f} s"
    )
    return {
        "resume_rounds_lost": max(0, stood - resumed),
        "resume_equal": number > resumed and swarm.is_equal(),
        "resume_seconds": round(seconds, 1),
    }
