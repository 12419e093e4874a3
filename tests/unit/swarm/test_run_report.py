"""A run on one page: what its peers noted is drawn and tabled, and their names cannot be more than text."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from swarm.cli.main import main
from swarm.errors import BadData
from swarm.new_run import create_run
from swarm.reports.metrics import Entry, MetricsLog
from swarm.reports.run_report import COLUMNS, find_metrics, page, plots_of, rows_of, write_report
from swarm.state import lock_state


def noted(directory: Path, start: float = 1e9, steps: int = 20) -> Path:
    """A peer that trained `steps` steps, a second each, with two rounds, one that failed, and evaluations."""
    directory.mkdir(parents=True)
    now = [start]
    log = MetricsLog(directory, clock=lambda: now[0])
    for step in range(1, steps + 1):
        now[0] += 1
        log.note("step", {"step": step, "loss": 3.0 - step / 10, "tokens_per_second": 100.0})
        if step % 10 == 0:
            log.note("round", {"round": step // 10, "peers": 2, "sent": 5000, "seconds": 1.5, "merging_error": 0.1})
            log.note("evaluation", {"round": step // 10, "loss": 2.5 - step / 40})
            log.note(
                "swarm_evaluation", {"round": step // 10, "loss": 2.6, "peers": 2, "accuracy": step / 40, "auc": 0.5}
            )
            log.note("peer", {"hosts": 2, "sent": 1000 * step, "received": 500})
    log.note("round_failed", {"round": 3, "reason": "nobody came"})
    return directory


def test_peers_are_found_in_a_run_a_state_and_a_place_of_many(tmp_path: Path) -> None:
    noted(tmp_path / "run" / "peer")
    noted(tmp_path / "many" / "RUN" / "peer-0")
    noted(tmp_path / "many" / "RUN" / "peer-1")
    assert list(find_metrics(tmp_path / "run")) == ["peer"]
    assert list(find_metrics(tmp_path / "run" / "peer")) == ["peer"]
    assert list(find_metrics(tmp_path / "many")) == ["RUN/peer-0", "RUN/peer-1"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadData, match="empty has no metrics of peers; name the directory of a run"):
        find_metrics(tmp_path / "empty")
    with pytest.raises(BadData, match="cannot be read"):
        find_metrics(tmp_path / "nowhere")


def test_a_runs_directory_stands_for_trainers_of_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    run = create_run(tmp_path / "tales", {"model": {"name": "m", "fingerprint": "ab" * 32, "num_blocks": 2}})
    noted(run.directory / "peer")
    for of in (run.run_id, "another-run"):
        noted(tmp_path / "data" / "swarmtune" / of / "peer-0")
        lock_state(tmp_path / "data" / "swarmtune" / of / "peer-0").close()
    done = CliRunner().invoke(main, ["report", str(run.directory), "--out", str(tmp_path / "tales.html")])
    assert done.exit_code == 0, done.output
    drawn = (tmp_path / "tales.html").read_text()
    assert [drawn.count(f"<td>{name}</td>") for name in ("peer", "peer-0")] == [1, 1]


def test_curves_begin_with_the_first_peer_and_keep_their_ends(tmp_path: Path) -> None:
    noted(tmp_path / "a", start=1000.0)
    noted(tmp_path / "b", start=1500.0, steps=5000)
    plots = {plot.name: plot for plot in plots_of(find_metrics(tmp_path))}
    first, second, *held_out = plots["loss"].curves
    assert [curve.label for curve in held_out] == ["a, held out", "b, held out"]
    assert (first.seconds[0], first.seconds[-1], first.values[-1]) == (0.0, 19.0, 1.0)
    assert (second.seconds[0], second.seconds[-1], second.values[-1]) == (500.0, 5499.0, 3.0 - 500)
    assert len(second.values) <= 2001
    assert list(plots["rounds"].curves[0].values) == [1.0, 2.0]
    assert list(plots["held_out"].curves[0].values) == [2.6, 2.6]
    assert [curve.label for curve in plots["scores"].curves] == ["a, accuracy", "b, accuracy", "a, AUC", "b, AUC"]
    assert list(plots["scores"].curves[0].values) == [0.25, 0.5]
    assert {
        "peers",
        "hosts",
        "speed",
        "sent",
        "received",
        "round_bytes",
        "round_seconds",
        "merging_error",
    } < plots.keys()


def test_a_peer_that_trained_nothing_has_no_plot_of_loss() -> None:
    entries = {"host": [Entry(time=5.0, kind="peer", values={"hosts": 1, "sent": 0})]}
    assert [plot.name for plot in plots_of(entries)] == ["hosts", "sent"]


def test_a_row_tells_of_rounds_failures_and_losses(tmp_path: Path) -> None:
    noted(tmp_path / "ann")
    row = dict(zip(COLUMNS, rows_of(find_metrics(tmp_path))[0], strict=True))
    assert (row["peer"], row["rounds"], row["failed"], row["steps"]) == ("ann", "2", "1", "20")
    assert (row["last loss"], row["best held out"], row["sent"]) == ("1.0000", "2.0000", "20,000")


def test_names_are_text_on_the_page() -> None:
    written = page("<script>1</script>", [["<b>x</b>"] + [""] * (len(COLUMNS) - 1)], [])
    assert "<script>" not in written
    assert "<b>x" not in written
    assert "&lt;b&gt;x" in written


def test_the_page_needs_nothing_else_and_each_plot_is_a_picture_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the package matplotlib: pip install 'swarmtune[report]'")
    noted(tmp_path / "run" / "peer $x_1$")  # no formula of matplotlib's
    out, *pictures = write_report(tmp_path / "run", tmp_path / "out" / "report.html")
    text = out.read_text()
    inside = [base64.b64decode(found) for found in re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", text)]
    assert inside == [picture.read_bytes() for picture in pictures]
    assert all(picture.startswith(b"\x89PNG") for picture in inside)
    assert [picture.name for picture in pictures[:2]] == ["report-loss.png", "report-rounds.png"]
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    (tmp_path / "taken").mkdir()
    with pytest.raises(BadData, match=r"cannot be written to .*taken"):
        write_report(tmp_path / "run", tmp_path / "taken")
