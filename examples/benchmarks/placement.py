"""Where hosts go by our rules as they come, leave and break, next to the best placement; ends with one JSON object.

A simulation of 200 and of 1,000 hosts on a model of 60 blocks: speeds over a factor of 50, room for 2 to 30 blocks,
20% an hour vanish without a word and as many come. Each host decides for itself from records up to a minute old, in
which the dead stay for 5 to 30 s, and while it loads (20 s and 2 s a block) it serves nothing. No bytes, no tokens;
see parts/placement_swarm.py. Of several seeds, each number is that of the worst.

`throughput_of_best_200`, `..._1000`: the mean over time of tokens/s (peers/placing/throughput.py says of what) over the
upper bound for the hosts that are there, those that are loading included; `least_of_best_...`: the least at any moment;
`even_of_best_...`: the mean if each host shared its time evenly among its blocks, which with most mixtures of hosts
cannot be much above 0.9 in any placement. `moves_per_peer_hour_...`; `uncovered_seconds_...`: in which some block had
no host. `given_up_...`: moves that were promised and not made, because records read anew said otherwise.
`..._hole`: the same with 200 hosts, all holders of 4 blocks, a quarter of the swarm, dying at once;
`recovery_seconds_hole`: from then until it is back at 90% of the best. `..._shrinking`: 50% an hour leave, 10% come.
`..._unplaced`: 200 hosts that hold anything and never move, for comparison.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from parts.placement_swarm import Outcome, Swarm, World
from parts.report import Bench, Values, run_parts

from blocks.spans import Span

SEEDS = (101, 102, 103, 104, 105)  # the rules' numbers were chosen on 1, 2 and 3
HOLE = Span(20, 24)


def measure_200(bench: Bench) -> Values:
    """Two hundred hosts."""
    return _worst(bench, "200", [World(num_peers=200, hours=bench.pick(1, 3), seed=seed) for seed in _seeds(bench)])


def measure_1000(bench: Bench) -> Values:
    """A thousand hosts."""
    worlds = [
        World(num_peers=1000, hours=bench.pick(1, 2) / 2, warmup_hours=0.25, seed=seed)
        for seed in _seeds(bench)[: bench.pick(1, 3)]
    ]
    return _worst(bench, "1000", worlds)


def measure_hole(bench: Bench) -> Values:
    """All hosts of some blocks die at once."""
    worlds = [World(num_peers=200, hours=1, warmup_hours=0.25, seed=seed, hole=HOLE) for seed in _seeds(bench)]
    return _worst(bench, "hole", worlds)


def measure_shrinking(bench: Bench) -> Values:
    """A swarm that loses far more hosts than it gains."""
    worlds = [
        World(num_peers=200, hours=1, seed=seed, leaving_per_hour=0.5, joining_per_hour=0.1) for seed in _seeds(bench)
    ]
    return _worst(bench, "shrinking", worlds)


def measure_unplaced(bench: Bench) -> Values:
    """What there is without rules."""
    worlds = [World(num_peers=200, hours=0.5, warmup_hours=0.25, seed=seed, placed=False) for seed in _seeds(bench)]
    return _worst(bench, "unplaced", worlds)


def _seeds(bench: Bench) -> Sequence[int]:
    return SEEDS[: bench.pick(1, len(SEEDS))]


def _worst(bench: Bench, name: str, worlds: Sequence[World]) -> Values:
    """Each number of the seed where it is worst."""
    outcomes: list[Outcome] = []
    for world in worlds:
        outcomes.append(one := Swarm(world).run())
        bench.say(
            f"{name}, seed {world.seed}: {one.throughput_of_best:.3f} of the best, {one.moves_per_peer_hour:.3f} moves "
            f"an hour and host, {one.uncovered_seconds:.0f} s uncovered"
        )
    found: Mapping[str, float] = {
        "throughput_of_best": min(one.throughput_of_best for one in outcomes),
        "least_of_best": min(one.least_of_best for one in outcomes),
        "even_of_best": min(one.even_of_best for one in outcomes),
        "moves_per_peer_hour": max(one.moves_per_peer_hour for one in outcomes),
        "uncovered_seconds": max(one.uncovered_seconds for one in outcomes),
        "given_up": max(one.given_up for one in outcomes),
    }
    if name == "hole":
        found = {**found, "recovery_seconds": max(one.recovery_seconds for one in outcomes)}
    return {f"{key}_{name}": round(value, 4) for key, value in found.items()}


if __name__ == "__main__":
    run_parts(
        __doc__,
        {
            "200": measure_200,
            "1000": measure_1000,
            "hole": measure_hole,
            "shrinking": measure_shrinking,
            "unplaced": measure_unplaced,
        },
    )
