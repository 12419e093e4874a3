"""A swarm of small peers under random faults for as long as you like; nothing may be lost, and nothing may grow.

    python examples/soak.py --minutes 60 --seed 1 --json

Hosts of a tiny random model, half of them for each half of it, and a trainer, all processes of their own behind links.
About every 10 s one fault of parts/faults.py strikes a host, or the trainer is killed, drawn from the seed; who has
died starts again from its state. All ends with Ctrl-C or SIGTERM as after its minutes, with a table or one JSON object:

`faults` by kind, `faults_injected`; `rounds`, `samples` trained, `steps`; `seconds_lost` in gaps between two steps that
are longer than usual, `longest_gap_seconds`. What was lost, counted when the last fault is over: `rounds_back`: how far
the newest round is behind the newest ever seen; `units_missing`: blocks without a holder; `units_equal`: whether all
holders have the same bits after one more round; `trainer_steps_back`: steps that a trainer did not know of any more.
`round_dips`: how far the newest round of any block among the living fell for a while. `died`: who ended though nobody
killed it; `failed_starts`. `megabytes`, `files`, `processes` of all peers at the start and the end; `growth`: hosts by
age, from their second minute on; `left_behind`: processes that did not end. The exit status is 1 if something was lost.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

from parts.report import say
from parts.soak_run import Soak, SoakPlan


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--peers", type=int, default=8, help="hosts, half of them for each half of the model; 4 or more"
    )
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two faults, on average")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on stdout; else a table")
    given = parser.parse_args()
    if given.minutes <= 0 or given.peers < 4 or given.every <= 0:
        parser.error("--minutes and --every must be positive, and --peers 4 or more")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # as Ctrl-C does
    with tempfile.TemporaryDirectory(prefix="swarm-soak-", ignore_cleanup_errors=True) as name:
        plan = SoakPlan(
            root=Path(name),
            seconds=60 * given.minutes,
            seed=given.seed,
            num_peers=given.peers,
            every_seconds=given.every,
        )
        found = Soak(plan).run()
    if given.json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        for key, value in found.items():
            say(f"{key:24}{value}")
    return 0 if found["nothing_lost"] else 1


if __name__ == "__main__":
    sys.exit(main())
