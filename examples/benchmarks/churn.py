"""What faults cost a swarm of real processes, against an undisturbed one; ends with one JSON object.

`faults`: one row for each kind of parts/faults.py, each for 3 s (2 in a quick run) on one of 4 hosts of a tiny model, 2
for each half. `went_on`: a step ended within 15 s of the fault. `seconds_lost`: what the steps from the fault on took
beyond their usual time. `survivors_equal`: after the next completed round all holders of a unit have the same bits,
those who came back included. `loss_gap`: held-out loss after all that, against an undisturbed swarm after as many
samples, which goes on beside it; what earlier rows lost is in it. `survivors_equal` of the whole: so in every row.

`throughput_kept`: tokens/s while one of 4 hosts of SmolLM2-135M (`pip install 'swarmtune[demo]'`) is killed by SIGKILL
every 30 s for 5 minutes and started again 2 s later, over tokens/s of an undisturbed swarm on the same samples;
`loss_gap`: the gap of their held-out losses at the end. A quick run has the tiny model and two kills, 8 s apart, and
compares with the same swarm before the first; its `loss_gap` is the last of the rows.

`last_holder_seconds`: of three hosts that hold half of the model each, the one that holds its half alone is killed;
from then until a step is done. `last_holder_healed`: before it was started again, which happens after 45 s.
`resume_rounds_lost`: rounds lost when all processes are killed at once and start again from their directories;
`resume_equal`: holders are equal after their next round.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import cycle

from parts.chaos_hosts import Layout
from parts.chaos_swarm import BATCH, SETTINGS, ChaosSwarm, tiny_layout
from parts.churn_course import Churn, Work, kill_everybody, kill_last_holder, kills, num_steps, train_under
from parts.fault_course import HELD_OUT_ROWS, ROWS, STRIKE_AT, gap, play
from parts.faults import ALL_KINDS, Fault, FaultPlan
from parts.report import Bench, Values, run_parts
from parts.swarms import CACHE, HALVES, MODEL
from parts.tiny_model import BACK, FRONT, save_tiny_model

from swarm.data.demo_text import pydoc_samples
from swarm.peer import Peer

FAULT_SECONDS = (2, 3)  # in a quick run, and else
WAIT_SECONDS = 300.0  # the trainer's, for blocks that nobody holds
KILL_EVERY_SECONDS, CHURN_SECONDS = 30.0, 300.0
QUICK_EVERY_SECONDS, QUICK_SECONDS, QUICK_CALM_SECONDS = 8.0, 16.0, 4.0
LENGTH, HELD_OUT, WARM_STEPS = 128, 16, 8
TINY_WORK = Work(rows=ROWS, held_out=HELD_OUT_ROWS)
TINY_SETTINGS: Mapping[str, Mapping[str, object]] = {
    **SETTINGS,
    "training": {"batch_size": BATCH, "sequence_length": 32, "learning_rate": 2e-3},
    "rounds": {"round_samples": 4 * BATCH, "round_seconds": 3.0},
}
REAL_SETTINGS: Mapping[str, Mapping[str, object]] = {
    "training": {"batch_size": BATCH, "sequence_length": LENGTH, "learning_rate": 1e-3},
    "adapter": {"lora_rank": 8},
    "rounds": {"round_samples": 8 * BATCH, "round_seconds": 10.0},
    "wire": {"dtype": "bf16"},
    "model": {"compute_dtype": "fp32"},
}


class Measures:
    """The parts of this benchmark; in a quick run the undisturbed swarm of the first serves the last, too."""

    def __init__(self) -> None:
        self._quick_churn: Values = {}

    def faults(self, bench: Bench) -> Values:
        """A row for each kind, and everybody's death. Most of a stretch is waiting, so both courses go side by side."""
        root = bench.directory / "faults"
        layout = tiny_layout(root, save_tiny_model(root / "model"), settings=TINY_SETTINGS)
        steps = bench.pick(10, 40)
        with closing(ChaosSwarm(root / "calm", layout)) as calm:
            with closing(ChaosSwarm(root / "struck", layout)) as struck, ThreadPoolExecutor(1) as beside:
                trainers = _warm(bench, calm), _warm(bench, struck)
                rows: dict[str, Values] = {}
                for kind, name in zip(ALL_KINDS, cycle(layout.spans), strict=False):
                    fault = Fault(kind=kind, name=name, at=STRIKE_AT, seconds=bench.pick(*FAULT_SECONDS))
                    undisturbed = beside.submit(play, calm, trainers[0], steps, None)
                    rows[kind] = play(struck, trainers[1], steps, fault).row(undisturbed.result())
                    bench.say(f"{kind}: {rows[kind]}")
                resumed = kill_everybody(bench, struck, ("trainer", "trainer-again"), TINY_WORK)
            if bench.quick:
                self._kill_some(bench, calm, trainers[0])
        found: Values = {"faults": rows, "survivors_equal": all(row["survivors_equal"] for row in rows.values())}
        last = {"loss_gap": rows[ALL_KINDS[-1]]["loss_gap"]} if bench.quick else {}
        return {**found, **resumed, **last}

    def churn(self, bench: Bench) -> Values:
        """Kills while SmolLM2 is trained; in a quick run a tiny model."""
        if not bench.quick:
            return _churn_of_smollm2(bench)
        if not self._quick_churn:
            root = bench.directory / "churn"
            layout = tiny_layout(root, save_tiny_model(root / "model"), settings=TINY_SETTINGS)
            with closing(ChaosSwarm(root / "swarm", layout)) as swarm:
                self._kill_some(bench, swarm, _warm(bench, swarm))
        return self._quick_churn

    def _kill_some(self, bench: Bench, swarm: ChaosSwarm, trainer: Peer) -> None:
        """The quick run's churn: on one swarm, first a stretch without kills."""
        usual = swarm.train(trainer, WARM_STEPS, data=ROWS).usual_step
        plan = kills(0, _in_turn(swarm.layout), QUICK_EVERY_SECONDS, 2)
        speeds = []
        for seconds, each in ((QUICK_CALM_SECONDS, FaultPlan(seed=0)), (QUICK_SECONDS, plan)):
            churn = train_under(swarm, trainer, TINY_WORK, each, num_steps(seconds, usual))
            bench.say(str(churn))
            speeds.append(churn.tokens_per_second)
        self._quick_churn = _kept(*speeds)


def measure_last_holder(bench: Bench) -> Values:
    """Three hosts that choose their blocks themselves: two hold the same, the third the rest alone."""
    root = bench.directory / "last"
    model = save_tiny_model(root / "model")
    layout = tiny_layout(root, model, spans={"a": FRONT, "b": BACK, "c": FRONT}, settings=TINY_SETTINGS)
    layout = replace(layout, extra=("--blocks", "auto", "--max-blocks", str(len(FRONT))))
    with closing(ChaosSwarm(root / "swarm", layout)) as swarm:
        swarm.start_all()
        trainer = swarm.enter("trainer", route_seconds=WAIT_SECONDS)
        return kill_last_holder(bench, swarm, trainer, TINY_WORK)


def _churn_of_smollm2(bench: Bench) -> Values:
    spans = {"a": HALVES[0], "b": HALVES[1], "c": HALVES[0], "d": HALVES[1]}
    layout = Layout(model=MODEL, spans=spans, settings=REAL_SETTINGS, cache_home=CACHE)
    plan = kills(0, _in_turn(layout), KILL_EVERY_SECONDS, round(2 * CHURN_SECONDS / KILL_EVERY_SECONDS))
    calm = _on_its_own(bench, layout, "calm", FaultPlan(seed=0))
    churn = _on_its_own(bench, layout, "churn", plan, steps=calm.steps)
    loss_gap = round(gap(churn.loss, calm.loss), 4)
    return {**_kept(calm.tokens_per_second, churn.tokens_per_second), "loss_gap": loss_gap, "steps": calm.steps}


def _in_turn(layout: Layout) -> list[str]:
    """All hosts, by turns of those that hold different blocks: one that was killed has time to come back before all
    others of its blocks are.
    """
    return [name for names in zip(*layout.groups().values(), strict=True) for name in names]


def _on_its_own(bench: Bench, layout: Layout, name: str, plan: FaultPlan, steps: int = 0) -> Churn:
    """A swarm of its own under `plan`; without `steps`, as many as take most of the time that the kills shall take."""
    with closing(ChaosSwarm(bench.directory / name, layout)) as swarm:
        swarm.start_all()
        trainer, work = _enter(swarm)
        usual = swarm.train(trainer, WARM_STEPS, data=work.rows).usual_step
        found = train_under(swarm, trainer, work, plan, steps or num_steps(0.85 * CHURN_SECONDS, usual))
    bench.say(f"{name}: {found}")
    return found


def _warm(bench: Bench, swarm: ChaosSwarm) -> Peer:
    """All hosts of a tiny model, and a trainer whose first steps are done."""
    swarm.start_all()
    bench.say(f"{len(swarm.layout.spans)} hosts are up")
    trainer = swarm.enter("trainer", route_seconds=WAIT_SECONDS)
    swarm.train(trainer, WARM_STEPS, data=ROWS)
    return trainer


def _enter(swarm: ChaosSwarm) -> tuple[Peer, Work]:
    trainer = swarm.enter("trainer", route_seconds=WAIT_SECONDS)
    rows, held_out = pydoc_samples(trainer.tokenizer(), LENGTH)
    return trainer, Work(rows=rows, held_out=held_out.head(HELD_OUT))


def _kept(calm: float, churn: float) -> Values:
    return {
        "throughput_kept": round(churn / calm, 3),
        "calm_tokens_per_second": round(calm, 1),
        "churn_tokens_per_second": round(churn, 1),
    }


if __name__ == "__main__":
    measures = Measures()
    run_parts(__doc__, {"faults": measures.faults, "last_holder": measure_last_holder, "churn": measures.churn})
