"""How long a round takes, next to hivemind's own averager and torch's gloo in the same run; ends with one JSON object.

Five million fp32 parameters in 30 units that every peer holds. Each peer is a process of its own with one thread for
tensors. A round's seconds are the slowest peer's, from the agreed moment until it has the averaged units; what comes
before that moment (0.3 s here) does not count, as in a swarm the records agree on it while training goes on. All
results are equal to the bit, and the first is compared with the mean in fp64. Medians of what comes after the first one
or two rounds of each crew, of gloo and of hivemind's averagers, in which connections and memory grow.

`round_4_seconds`, `round_8_seconds`: rounds of 4 and of 8 peers; `phases_4`, `phases_8`: the slowest peer's seconds in
each phase. `full_groups_of_20`: rounds of 8, of 20, in which every peer averaged every unit with all others.
`hivemind_4_seconds`, `hivemind_tuned_4_seconds`: DecentralizedAverager with its defaults (min_matchmaking_time 5,
request_timeout 3), and with 2, 1 and target_group_size 4. `..._full`: in how many of `..._rounds` all 4 were one group.
`allreduce_over_gloo`: a round's all-reduce of 4 over torch.distributed's all_reduce of 4 on the same vector, measured
in turn; ours includes the digest of the result, which the votes need. `bytes_8bit_ratio`: bytes that a peer sends in
the codec int8 over those in fp32.
`recovery_seconds`: from a SIGKILL of one of 4 peers within the all-reduce, whose survivors apply nothing then, until
the next round is done among the other 3.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from parts.gloo import Gloo
from parts.report import Bench, Values, median, run_parts
from parts.rival_averager import Rivals
from parts.round_kills import measure_kill
from parts.round_peers import PHASES, Crew, Row

PARAMETERS = 5_000_000
WARM_UP = 2
MAX_ERROR = 1e-6  # of the largest value: what sums in fp32 may be off
EIGHT_BIT = "int8"
TUNED = {"min_matchmaking_time": 2.0, "request_timeout": 1.0, "target_group_size": 4}


def measure_four(bench: Bench, parameters: int = PARAMETERS, num_peers: int = 4) -> Values:
    """Rounds of 4 peers and gloo in turn, then some in the 8-bit codec."""
    rows: list[Row] = []
    floor: list[float] = []
    with (
        Crew.of(bench.directory / "four", num_peers, parameters) as crew,
        Gloo.of(bench.directory, num_peers, parameters) as gloo,
    ):
        bench.say(f"{num_peers} peers and {num_peers} processes of gloo are up")
        for _ in range(WARM_UP):
            _play(bench, crew, num_peers)
        for _ in range(bench.pick(7, 11)):
            rows.append(_play(bench, crew, num_peers))
            floor += gloo.measure(2)
        whole = _whole(rows)
        eight_bit_bytes = _eight_bit_bytes(bench, crew)
    reduce_seconds = statistics.median(row.allreduce_seconds for row in whole)
    sent = statistics.median(row.bytes_sent for row in whole)
    return {
        f"round_{num_peers}_seconds": median([row.seconds for row in whole]),
        f"round_{num_peers}_full": len(whole),
        f"round_{num_peers}_rounds": len(rows),
        f"phases_{num_peers}": _phases(whole),
        f"allreduce_{num_peers}_seconds": round(reduce_seconds, 3),
        "allreduce_over_gloo": round(reduce_seconds / statistics.median(floor), 2),
        f"gloo_{num_peers}_seconds": round(statistics.median(floor), 4),
        "bytes_sent_per_peer": round(sent),
        "bytes_8bit_ratio": round(eight_bit_bytes / sent, 4),
    }


def measure_eight(bench: Bench, parameters: int = PARAMETERS, num_peers: int = 8, repeats: int = 20) -> Values:
    """Rounds of 8 peers, all of them counted, full or not."""
    with Crew.of(bench.directory / "eight", num_peers, parameters) as crew:
        bench.say(f"{num_peers} peers are up")
        for _ in range(WARM_UP):
            _play(bench, crew, num_peers)
        rows = [_play(bench, crew, num_peers) for _ in range(repeats)]
    return {
        f"round_{num_peers}_seconds": median([row.seconds for row in rows]),
        f"phases_{num_peers}": _phases(rows),
        f"round_{num_peers}_slowest_seconds": round(max(row.seconds for row in rows), 3),
        f"full_groups_of_{repeats}": sum(row.whole for row in rows),
    }


def measure_recovery(bench: Bench, parameters: int = PARAMETERS, repeats: int = 0) -> Values:
    """One peer of 4 is killed, three times or, in a quick run, twice; who replaces it has been there from the start."""
    survivors, seconds, failed = 3, list[float](), list[float]()
    repeats = repeats or bench.pick(2, 3)
    with Crew.of(bench.directory / "recovery", survivors + repeats, parameters) as crew:
        bench.say(f"{survivors} peers and {repeats} that will be killed are up")
        for victim in crew.peers[survivors:]:
            kill = measure_kill(crew, crew.peers[:survivors], victim)
            seconds.append(kill.recovered_seconds)
            failed.append(kill.failed_seconds)
            bench.say(f"killed: given up after {failed[-1]:.2f} s, the next round was done after {seconds[-1]:.2f} s")
    return {"recovery_seconds": median(seconds), "recovery_failed_round_seconds": median(failed)}


def measure_rivals(bench: Bench, parameters: int = PARAMETERS, num_peers: int = 4) -> Values:
    """hivemind's own averager, with its defaults and tuned."""
    found: Values = {}
    for name, settings, repeats in (("hivemind", {}, bench.pick(2, 3)), ("hivemind_tuned", TUNED, bench.pick(3, 7))):
        seconds, full = list[float](), 0
        with Rivals.of(settings, num_peers, parameters) as rivals:
            bench.say(f"{num_peers} peers of {name} are up")
            rivals.step()
            for _ in range(repeats):
                taken, whole = rivals.step()
                seconds.append(taken)
                full += whole
                bench.say(f"{name}: {taken:.2f} s{'' if whole else ', not all in one group'}")
        key = f"{name}_{num_peers}"
        found |= {f"{key}_seconds": median(seconds), f"{key}_full": full, f"{key}_rounds": repeats}
    return found


def _play(bench: Bench, crew: Crew, num_peers: int) -> Row:
    """One round of the first `num_peers`; the first one's result is compared with the mean."""
    peers = crew.peers[:num_peers]
    row = crew.play(peers)
    shown = ", ".join(f"{name} {row.phases[name]:.2f}" for name in PHASES)
    why = "" if row.whole else f", not whole: {'; '.join(sorted(set(row.reasons)))}"
    bench.say(f"round {crew.number} of {num_peers}: {row.seconds:.2f} s ({shown}){why}")
    if crew.number == 1 and row.whole and (error := crew.mean_error(peers)) > MAX_ERROR:
        raise SystemExit(f"the result is not the mean: off by {error:.1e} of the largest value")
    return row


def _eight_bit_bytes(bench: Bench, crew: Crew) -> float:
    """Bytes that a peer sends in one round in the 8-bit codec."""
    crew.use_codec(EIGHT_BIT)
    rows = [_play(bench, crew, len(crew.peers)) for _ in range(bench.pick(2, 3))]
    rows = _whole(rows)
    bench.say(f"8 bits: {median([row.seconds for row in rows])} s, off by {crew.mean_error(crew.peers):.1e}")
    return statistics.median(row.bytes_sent for row in rows)


def _whole(rows: Sequence[Row]) -> list[Row]:
    """The rounds whose time means something; how many there were is told beside it."""
    whole = [row for row in rows if row.whole]
    if not whole:
        raise SystemExit("no round was whole, so their times say nothing; is this machine too busy?")
    return whole


def _phases(rows: list[Row]) -> dict[str, float]:
    return {name: median([row.phases[name] for row in rows]) for name in PHASES}


if __name__ == "__main__":
    run_parts(
        __doc__,
        {"four": measure_four, "hivemind": measure_rivals, "eight": measure_eight, "recovery": measure_recovery},
    )
