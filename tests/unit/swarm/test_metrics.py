"""Metrics on disk: whole lines come back, torn ones and nonsense do not, and the files stay bounded."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import BadConfig
from swarm.reports import metrics
from swarm.reports.metrics import NAME, OLD_NAME, Entry, MetricsLog, read_metrics
from swarm.reports.trackers import make_tracker
from tests.logged import logged_by


def clocked(directory: Path, most_bytes: int = 1 << 20) -> MetricsLog:
    ticks = iter(range(1, 10**6))
    return MetricsLog(directory, most_bytes=most_bytes, clock=lambda: float(next(ticks)))


def test_what_was_noted_is_read(tmp_path: Path) -> None:
    log = clocked(tmp_path)
    log.note("step", {"loss": 2.5, "step": 1, "peers": None})
    log.note("round", {"round": 1, "merging_error": math.nan, "sent": math.inf, "reason": "é\n"})
    assert read_metrics(tmp_path) == [
        Entry(time=1.0, kind="step", values={"loss": 2.5, "step": 1, "peers": None}),
        Entry(time=2.0, kind="round", values={"round": 1, "reason": "é\n"}),
    ]
    assert read_metrics(tmp_path)[0].number("loss") == 2.5
    assert read_metrics(tmp_path)[0].number("peers") is None
    assert read_metrics(tmp_path / "none") == []


def test_a_torn_last_line_is_passed_over_and_what_comes_after_it_is_whole(tmp_path: Path) -> None:
    log = clocked(tmp_path)
    log.note("step", {"step": 1})
    log.note("step", {"step": 2})
    path = tmp_path / NAME
    path.write_bytes(path.read_bytes()[:-7])
    assert [entry.number("step") for entry in read_metrics(tmp_path)] == [1]
    log.note("step", {"step": 3})
    assert [entry.number("step") for entry in read_metrics(tmp_path)] == [1, 3]


def test_files_are_bounded_and_the_newest_lines_stay(tmp_path: Path) -> None:
    log = clocked(tmp_path, most_bytes=1000)
    for number in range(200):
        log.note("step", {"step": number})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([NAME, OLD_NAME])
    assert all(path.stat().st_size <= 1000 for path in tmp_path.iterdir())
    steps = [entry.number("step") for entry in read_metrics(tmp_path)]
    assert steps == list(range(200 - len(steps), 200))
    assert len(steps) > 1000 // 50


def test_a_full_disk_is_told_of_once_and_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / NAME).mkdir()
    log = clocked(tmp_path)
    for _ in range(3):
        log.note("step", {"step": 1})
    assert [line.count("metrics are not written") for line in logged_by(metrics, caplog)] == [1]


@given(line=st.one_of(st.binary(max_size=200), st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["time", "kind", "a"]), inner),
).map(lambda value: json.dumps(value).encode())))  # fmt: skip
def test_no_line_breaks_the_reader(tmp_path_factory: pytest.TempPathFactory, line: bytes) -> None:
    directory = tmp_path_factory.mktemp("metrics")
    (directory / NAME).write_bytes(line.replace(b"\n", b" ") + b"\n" + b'{"time": 5, "kind": "step", "step": 1}\n')
    found = read_metrics(directory)
    assert Entry(time=5.0, kind="step", values={"step": 1}) in found
    assert all(math.isfinite(entry.time) for entry in found)


def test_a_sink_gets_each_entry(tmp_path: Path) -> None:
    log, got = clocked(tmp_path), []
    log.sinks.append(got.append)
    log.note("peer", {"hosts": 3})
    assert got == read_metrics(tmp_path)


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the package tensorboard: pip install 'swarmtune[report]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink, end = make_tracker("tensorboard", run="tales", peer="Qm", state=tmp_path)
    sink(Entry(time=10.0, kind="step", values={"loss": 2.5, "step": 7, "reason": "no number"}))
    end()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("step/loss")] == [(7, 2.5)]
    assert sorted(events.Tags()["scalars"]) == ["step/loss", "step/step"]


def test_a_tracker_that_is_not_installed_or_not_known_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(BadConfig, match="--track wandb needs the package wandb; pip install wandb"):
        make_tracker("wandb", run="tales", peer="Qm", state=tmp_path)
    with pytest.raises(BadConfig, match="use one of tensorboard, wandb, trackio"):
        make_tracker("mlflow", run="tales", peer="Qm", state=tmp_path)


def test_other_trackers_are_begun_with_the_run_and_told_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    tracker = SimpleNamespace(
        init=lambda **given: calls.append(given), log=calls.append, finish=lambda: calls.append("finish")
    )
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    sink, end = make_tracker("trackio", run="tales", peer="Qm", state=tmp_path)
    sink(Entry(time=1.0, kind="evaluation", values={"loss": 2.0}))
    end()
    assert calls == [{"project": "tales", "name": "Qm"}, {"evaluation/loss": 2.0}, "finish"]
