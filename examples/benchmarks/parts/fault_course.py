"""One course of training in stretches, each with a fault of its own or none, and what each fault cost."""

from __future__ import annotations

from dataclasses import dataclass

from parts.chaos_swarm import ChaosSwarm, Story
from parts.faults import Fault, FaultPlan
from parts.report import Values
from parts.tiny_model import counting_rows

from swarm.peer import Peer

WENT_ON_SECONDS = 15.0
STRIKE_AT = 3  # steps of a stretch
ROWS, HELD_OUT_ROWS = counting_rows(64), counting_rows(24, first=64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """What one stretch gave: its steps, the held-out loss after it, and whether every holder of a unit had equal bits
    after a round that was done after the fault.
    """

    story: Story
    loss: float
    equal: bool

    def row(self, calm: Stretch) -> Values:
        """What its fault cost, against the same stretch of the undisturbed course."""
        struck = self.story.faults_at[0]
        after = [moment for moment in self.story.steps_at if moment >= struck]
        lost = after[-1] - struck - len(after) * calm.story.usual_step
        return {
            "went_on": after[0] - struck <= WENT_ON_SECONDS,
            "seconds_lost": round(max(0.0, lost), 2),
            "survivors_equal": self.equal,
            "loss_gap": round(gap(self.loss, calm.loss), 4),
        }


def gap(loss: float, calm_loss: float) -> float:
    """How much worse a loss is, as a part of the undisturbed one; below 0 it is better."""
    return loss / calm_loss - 1


def play(swarm: ChaosSwarm, trainer: Peer, steps: int, fault: Fault | None) -> Stretch:
    """One stretch with one fault or none, until it is undone and all samples are averaged among all hosts."""
    before = swarm.newest_round
    plan = FaultPlan(seed=0, faults=() if fault is None else (fault,))
    story = swarm.train(trainer, steps, plan, data=ROWS)
    swarm.settled()
    number = swarm.wait_averaged()
    equal = number > before and swarm.is_equal()
    return Stretch(story=story, loss=_held_out_loss(swarm, trainer), equal=equal)


def _held_out_loss(swarm: ChaosSwarm, trainer: Peer) -> float:
    """Before one more step."""
    return swarm.train(trainer, 1, data=ROWS, held_out=HELD_OUT_ROWS).held_out[0]
