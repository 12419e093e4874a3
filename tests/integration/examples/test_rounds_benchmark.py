"""The benchmark of rounds measures what it says, here with tiny tensors and few peers."""

from __future__ import annotations

import json
from pathlib import Path

import rounds
from parts.report import Bench

PARAMETERS = 20_000


def bench(tmp_path: Path) -> Bench:
    return Bench(directory=tmp_path, quick=True)


def test_rounds_are_measured_against_gloo(tmp_path: Path) -> None:
    found = rounds.measure_four(bench(tmp_path), PARAMETERS, 2)
    assert found.keys() == {
        *("round_2_seconds", "round_2_full", "round_2_rounds", "phases_2", "bytes_sent_per_peer", "bytes_8bit_ratio"),
        *("allreduce_over_gloo", "allreduce_2_seconds", "gloo_2_seconds"),
    }
    assert 0 < found["allreduce_2_seconds"] < found["round_2_seconds"]
    assert 0 < found["phases_2"]["reduce"] < found["round_2_seconds"]
    # Each sends half of its values to the other, and the sums of the other half.
    assert 4 * PARAMETERS * 0.9 < found["bytes_sent_per_peer"] < 4 * PARAMETERS * 1.2
    assert json.loads(json.dumps(found)) == found


def test_full_groups_are_counted(tmp_path: Path) -> None:
    found = rounds.measure_eight(bench(tmp_path), PARAMETERS, 2, 2)
    assert found.keys() == {"round_2_seconds", "phases_2", "round_2_slowest_seconds", "full_groups_of_2"}
    assert found["full_groups_of_2"] == 2


def test_a_killed_peer_costs_a_round_and_the_next_one_is_measured(tmp_path: Path) -> None:
    # Large enough that the all-reduce is not over when the kill comes.
    found = rounds.measure_recovery(bench(tmp_path), 2_000_000, 1)
    assert found.keys() == {"recovery_seconds", "recovery_failed_round_seconds"}
    assert 0 < found["recovery_failed_round_seconds"] < found["recovery_seconds"]
