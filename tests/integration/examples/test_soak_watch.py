"""What a soak measures: gaps in training, rounds that fall back, memory and files of families of processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from parts.soak_watch import Ages, RoundWatch, TrainerWatch, family_of, usage

# Both wait for a line. The inner one is up when the outer one says so: what has just begun has no memory yet.
INNER = "print(flush=True); input()"
CHILD = (
    "import subprocess, sys\n"
    f"p = subprocess.Popen([sys.executable, '-c', {INNER!r}], stdout=subprocess.PIPE)\n"
    "p.stdout.readline(); print(p.pid, flush=True); input()"
)


def test_gaps_longer_than_usual_are_lost_seconds(tmp_path: Path) -> None:
    path = tmp_path / "trainer.json"
    watch = TrainerWatch(path)
    watch.look(0.0)  # there is no file yet
    for now, step in ((1.0, 1), (2.0, 3), (3.0, 5), (4.0, 7), (14.0, 8), (15.0, 10)):
        path.write_text(json.dumps({"step": step, "samples": 8 * step}))
        watch.look(now)
    assert (watch.step, watch.samples, watch.steps_back) == (10, 80, 0)
    assert watch.gaps == [0.5] * 6 + [10.0] + [0.5] * 2
    assert watch.lost_seconds(15.4) == pytest.approx(9.5)
    assert watch.lost_seconds(20.0) == pytest.approx(9.5 + 4.5), "no step since 15"


def test_a_trainer_that_forgets_steps_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "trainer.json"
    watch = TrainerWatch(path)
    for step in (5, 3, 4, 6):
        path.write_text(json.dumps({"step": step, "samples": step}))
        watch.look(float(step))
    path.write_text("torn")
    watch.look(9.0)
    assert (watch.step, watch.steps_back) == (6, 2)


def test_a_block_whose_newest_round_falls_is_seen() -> None:
    watch = RoundWatch()
    watch.note({0: 3, 1: 4})
    watch.note({0: 5})
    assert watch.back == 0
    watch.note({0: 4, 1: 1})
    assert (watch.back, watch.newest) == (3, {0: 5, 1: 4})


def test_usage_is_of_a_process_and_all_that_it_started(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert family_of(process.pid) == {process.pid, child}
        found = usage([process.pid, process.pid])
        assert found.processes == 2
        assert found.megabytes > usage([child]).megabytes > 1
        assert found.files >= 6
        process.communicate()
    assert usage([process.pid]).processes == 0


def test_memory_is_told_by_age_from_the_second_minute_on() -> None:
    ages, pid = Ages(), os.getpid()
    for now in (0.0, 30.0, 60.0, 90.0):
        ages.note(pid, now)
    assert ages.rows() == []
    ages.note(pid, 180.0)
    (row,) = ages.rows()
    assert row["minutes"] == 2.0
    assert row["from_mb"] > 1
