"""What faults cost a swarm of real processes, against an undisturbed one; ends with one JSON object.

`faults`: one row for each kind of parts/faults.py, each for 3 s on one of 4 hosts of a tiny model (2 for each half).
`went_on`: a step ended within 15 s of the fault. `seconds_lost`: what the steps from the fault on took beyond their
usual time. `survivors_equal`: after the next completed round all holders of a unit have the same bits, those who came
back included. `loss_gap`: held-out loss after all that, against an undisturbed swarm after as many samples; what
earlier rows lost is in it. `survivors_equal` of the whole: so in every row.

`throughput_kept`: tokens/s while one of 4 hosts of SmolLM2-135M (`pip install 'swarmtune[demo]'`) is killed by SIGKILL
every 30 s for 5 minutes and started again 2 s later, over tokens/s of an undisturbed swarm on the same samples;
`loss_gap`: the gap of their held-out losses at the end. A quick run has the tiny model and two kills, 12 s apart, and
compares with the same swarm before the first; its `loss_gap` is the last of the rows.

`last_holder_seconds`: of three hosts that hold half of the model each, the one that holds its half alone is killed;
from then until a step is done. `last_holder_healed`: before it was started again, which happens after 45 s.
`resume_rounds_lost`: rounds lost when all processes are killed at once and start again from their directories;
`resume_equal`: holders are equal after their next round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from parts.chaos_hosts import Layout
from parts.chaos_swarm import BATCH, SETTINGS, ChaosSwarm, tiny_layout
from parts.churn_course import Churn, Work, kill_everybody, kill_last_holder, kills, num_steps, train_under
from parts.fault_course import HELD_OUT_ROWS, ROWS, STRIKE_AT, calm_losses, gap, play
from parts.faults import ALL_KINDS, Fault, FaultKind, FaultPlan
from parts.report import Bench, Values, run_parts
from parts.swarms import CACHE, HALVES, MODEL
from parts.tiny_model import BACK, FRONT, save_tiny_model

from swarm.data.demo_text import pydoc_samples
from swarm.peer import Peer

FAULT_SECONDS = 3.0
WAIT_SECONDS = 300.0  # the trainer's, for blocks that nobody holds
KILL_EVERY_SECONDS, CHURN_SECONDS = 30.0, 300.0
QUICK_EVERY_SECONDS, QUICK_SECONDS, QUICK_CALM_SECONDS = 12.0, 24.0, 8.0
LENGTH, HELD_OUT, WARM_STEPS = 128, 16, 8
TINY_SETTINGS: Mapping[str, Mapping[str, object]] = {
    **SETTINGS,
    "training": {"batch_size": BATCH, "sequence_length": 32, "learning_rate": 2e-3},
    "rounds": {"round_samples": 4 * BATCH, "round_seconds": 1.5},
}
REAL_SETTINGS: Mapping[str, Mapping[str, object]] = {
    "training": {"batch_size": BATCH, "sequence_length": LENGTH, "learning_rate": 1e-3},
    "adapter": {"lora_rank": 8},
    "rounds": {"round_samples": 8 * BATCH, "round_seconds": 10.0},
    "wire": {"dtype": "bf16"},
    "model": {"compute_dtype": "fp32"},
}


def measure_faults(bench: Bench, kinds: tuple[FaultKind, ...] = ALL_KINDS) -> Values:
    """A row for each kind, and everybody's death."""
    root = bench.directory / "faults"
    layout = tiny_layout(root, save_tiny_model(root / "model"), settings=TINY_SETTINGS)
    steps = bench.pick(13, 40)
    calm = calm_losses(root / "calm", layout, 1 + len(kinds), steps)
    bench.say(f"undisturbed losses: {', '.join(f'{loss:.3f}' for loss in calm)}")
    swarm = ChaosSwarm(root / "swarm", layout)
    try:
        swarm.start_all()
        trainer = swarm.enter("trainer", route_seconds=WAIT_SECONDS)
        bench.say(f"{len(layout.spans)} hosts are up")
        usual = play(swarm, trainer, steps, None).story.usual_step
        bench.say(f"a step takes {usual:.2f} s")
        rows: dict[str, Values] = {}
        for number, kind in enumerate(kinds):
            name = list(layout.spans)[number % len(layout.spans)]
            fault = Fault(kind=kind, name=name, at=STRIKE_AT, seconds=FAULT_SECONDS)
            rows[kind] = play(swarm, trainer, steps, fault).row(usual, calm[1 + number])
            bench.say(f"{kind}: {rows[kind]}")
        work = Work(rows=ROWS, held_out=HELD_OUT_ROWS)
        found: Values = {"faults": rows, "survivors_equal": all(row["survivors_equal"] for row in rows.values())}
        found |= kill_everybody(bench, swarm, ("trainer", "trainer-again"), work)
    finally:
        swarm.close()
    if bench.quick:
        found["loss_gap"] = rows[kinds[-1]]["loss_gap"]
    return found


def measure_last_holder(bench: Bench) -> Values:
    """Three hosts that choose their blocks themselves: two hold the same, the third the rest alone."""
    root = bench.directory / "last"
    model = save_tiny_model(root / "model")
    layout = tiny_layout(root, model, spans={"a": FRONT, "b": BACK, "c": FRONT}, settings=TINY_SETTINGS)
    swarm = ChaosSwarm(root / "swarm", replace(layout, extra=("--blocks", "auto", "--max-blocks", str(len(FRONT)))))
    try:
        swarm.start_all()
        trainer = swarm.enter("trainer", route_seconds=WAIT_SECONDS)
        return kill_last_holder(bench, swarm, trainer, Work(rows=ROWS, held_out=HELD_OUT_ROWS))
    finally:
        swarm.close()


def measure_churn(bench: Bench) -> Values:
    """Kills while SmolLM2 is trained."""
    if bench.quick:
        calm, churn = _on_one_swarm(bench)
        return _kept(calm.tokens_per_second, churn.tokens_per_second)
    spans = {"a": HALVES[0], "b": HALVES[1], "c": HALVES[0], "d": HALVES[1]}
    layout = Layout(model=MODEL, spans=spans, settings=REAL_SETTINGS, cache_home=CACHE)
    plan = kills(0, list(spans), KILL_EVERY_SECONDS, round(2 * CHURN_SECONDS / KILL_EVERY_SECONDS))
    calm = _on_its_own(bench, layout, "calm", FaultPlan(seed=0))
    churn = _on_its_own(bench, layout, "churn", plan, steps=calm.steps)
    loss_gap = round(gap(churn.loss, calm.loss), 4)
    return {**_kept(calm.tokens_per_second, churn.tokens_per_second), "loss_gap": loss_gap, "steps": calm.steps}


def _on_its_own(bench: Bench, layout: Layout, name: str, plan: FaultPlan, steps: int = 0) -> Churn:
    """A swarm of its own under `plan`; without `steps`, as many as take most of the time that the kills shall take."""
    swarm = ChaosSwarm(bench.directory / name, layout)
    try:
        swarm.start_all()
        trainer, work = _enter(swarm)
        usual = swarm.train(trainer, WARM_STEPS, data=work.rows).usual_step
        found = train_under(swarm, trainer, work, plan, steps or num_steps(0.85 * CHURN_SECONDS, usual))
    finally:
        swarm.close()
    bench.say(f"{name}: {found}")
    return found


def _on_one_swarm(bench: Bench) -> tuple[Churn, Churn]:
    """Both with a tiny model, one after the other on the same swarm, which saves two starts and tells no losses."""
    root = bench.directory / "churn"
    layout = tiny_layout(root, save_tiny_model(root / "model"), settings=TINY_SETTINGS)
    swarm = ChaosSwarm(root / "swarm", layout)
    try:
        swarm.start_all()
        trainer, work = swarm.enter("trainer", route_seconds=WAIT_SECONDS), Work(rows=ROWS, held_out=HELD_OUT_ROWS)
        usual = swarm.train(trainer, WARM_STEPS, data=work.rows).usual_step
        found = []
        for seconds, plan in (
            (QUICK_CALM_SECONDS, FaultPlan(seed=0)),
            (QUICK_SECONDS, kills(0, list(layout.spans), QUICK_EVERY_SECONDS, 2)),
        ):
            found.append(train_under(swarm, trainer, work, plan, num_steps(seconds, usual)))
            bench.say(str(found[-1]))
    finally:
        swarm.close()
    return found[0], found[1]


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
    run_parts(__doc__, {"faults": measure_faults, "last_holder": measure_last_holder, "churn": measure_churn})
