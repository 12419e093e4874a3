"""One course of training in stretches, each with a fault of its own or none, and what each fault cost."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from parts.chaos_hosts import Layout
from parts.chaos_swarm import ChaosSwarm, Story, wait_averaged
from parts.faults import Fault, FaultPlan
from parts.report import Values
from parts.tiny_model import counting_rows

from peers.config import NetworkConfig
from swarm.api import init
from swarm.hosts.loading import HostingConfig
from swarm.local import LOOPBACK
from swarm.peer import Peer
from swarm.peer_config import PeerConfig

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

    def row(self, usual_step: float, calm_loss: float) -> Values:
        """What its fault cost, against a step's usual seconds and the loss of the undisturbed course."""
        struck = self.story.faults_at[0]
        after = [moment for moment in self.story.steps_at if moment >= struck]
        lost = after[-1] - struck - len(after) * usual_step
        return {
            "went_on": after[0] - struck <= WENT_ON_SECONDS,
            "seconds_lost": round(max(0.0, lost), 2),
            "survivors_equal": self.equal,
            "loss_gap": round(gap(self.loss, calm_loss), 4),
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
    """Before one more step, which the calm course makes too."""
    return swarm.train(trainer, 1, data=ROWS, held_out=HELD_OUT_ROWS).held_out[0]


def calm_losses(root: Path, layout: Layout, stretches: int, steps: int) -> list[float]:
    """Held-out losses after each stretch of the same course where nothing happens.

    Its hosts live in this process, as only their arithmetic matters and processes take long to start. It has its
    stretches as well: steps that never wait for a round would have fewer rounds, and learn less.
    """
    with _calm_peers(root, layout) as peers:
        *hosts, trainer = peers
        live = {host.id for host in hosts}
        losses = []
        for _ in range(stretches):
            trainer.train(ROWS, steps=steps)
            wait_averaged(trainer, live)
            losses.append(trainer.train(ROWS, steps=1, held_out=HELD_OUT_ROWS).evaluations[0].loss)
        return losses


@contextmanager
def _calm_peers(root: Path, layout: Layout) -> Iterator[list[Peer]]:
    """Hosts of the layout, and a trainer behind them; all end with the context."""
    cache = layout.cache_home / "swarmtune"
    run = init(root / "run", layout.model, cache_dir=cache, **layout.settings)
    peers: list[Peer] = []

    def enter(name: str) -> Peer:
        network = NetworkConfig(host=LOOPBACK)
        config = PeerConfig(
            state_root=root, state=root / "states" / name, cache_dir=cache, network=network, num_threads=1
        )
        peers.append(Peer.enter(peers[0].join if peers else run, config))
        return peers[-1]

    try:
        hosts = [enter(name) for name in layout.spans]
        with ThreadPoolExecutor(len(hosts)) as pool:
            hosting = HostingConfig(cache_dir=cache, num_threads=1)
            list(pool.map(lambda host, span: host.hold(span, hosting), hosts, layout.spans.values()))
        enter("trainer")
        yield peers
    finally:
        for peer in peers:
            peer.close()
