"""A run as its peers measured it, on one page: plots over time and a table, in a file that needs nothing else.

Reads what metrics.py wrote. Pure, save for `write_report`; the drawing is in plots.py.
"""

from __future__ import annotations

import base64
import html
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from swarm.errors import BadData
from swarm.reports.metrics import Entry, read_metrics

_MAX_PEERS = 64
_MAX_POINTS = 2000  # of a curve; more than a page has pixels
_STYLE = """
:root { color-scheme: light dark; font-family: system-ui, sans-serif; line-height: 1.45; }
body { max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; white-space: nowrap; padding: .25rem .6rem; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; background: #fff; border-radius: .4rem; }
figure { margin: 2rem 0; } figcaption { color: #777; }
.scroll { overflow-x: auto; }
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One line of a plot: seconds since the run's first entry, and values."""

    label: str
    seconds: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """What is drawn: a file name without ending, words, and curves; `steps` draws a value until the next one."""

    name: str
    title: str
    unit: str
    curves: Sequence[Curve]
    steps: bool = False


def find_metrics(directory: Path, others: Sequence[Path] = ()) -> dict[str, list[Entry]]:
    """The entries of all peers whose state is in a directory: it is a peer's, or has some in it, two levels deep.
    `others` are state directories of further peers.

    Raises:
        BadData: there are no metrics in it.
    """
    try:
        inside = sorted(path for path in directory.iterdir() if path.is_dir())
        inside += [path for parent in inside for path in sorted(parent.iterdir()) if path.is_dir()]
    except OSError as error:
        raise BadData(f"{directory} cannot be read ({error.strerror}); name a run's or a peer's directory") from None
    found = {
        str(path.relative_to(directory)) if path != directory else path.name: read_metrics(path)
        for path in [directory, *inside]
    }
    found |= {path.name: read_metrics(path) for path in others}
    found = {name: entries for name, entries in found.items() if entries}
    if not found:
        raise BadData(f"{directory} has no metrics of peers; name the directory of a run, or a peer's --state")
    return dict(list(found.items())[:_MAX_PEERS])


def plots_of(metrics: Mapping[str, Sequence[Entry]]) -> list[Plot]:
    """All plots for which there is something to draw."""
    start = min(entry.time for entries in metrics.values() for entry in entries)

    def curves(kind: str, value: str, label: str = "") -> list[Curve]:
        drawn = [_curve(name, entries, kind, value, start) for name, entries in metrics.items()]
        return [
            Curve(label=f"{curve.label}{label}", seconds=curve.seconds, values=curve.values)
            for curve in drawn
            if curve.values
        ]

    plots = [
        Plot(name="loss", title="Loss in training and held out", unit="nats per token",
             curves=[*curves("step", "loss"), *curves("evaluation", "loss", ", held out")]),
        Plot(name="rounds", title="Rounds done", unit="round", curves=curves("round", "round"), steps=True),
        Plot(name="peers", title="Peers in each round", unit="peers", curves=curves("round", "peers"), steps=True),
        Plot(name="hosts", title="Hosts that are seen", unit="hosts", curves=curves("peer", "hosts"), steps=True),
        Plot(name="speed", title="Training speed", unit="tokens/s", curves=curves("step", "tokens_per_second")),
        Plot(name="held_out", title="Loss on the held-out rows of all trainers", unit="nats per token",
             curves=curves("swarm_evaluation", "loss")),
        Plot(name="scores", title="Held-out rows of all trainers, classified", unit="of 1",
             curves=[*curves("swarm_evaluation", "accuracy", ", accuracy"),
                     *curves("swarm_evaluation", "macro_f1", ", F1"), *curves("swarm_evaluation", "auc", ", AUC")]),
        Plot(name="sent", title="Bytes sent since each start", unit="bytes", curves=curves("peer", "sent")),
        Plot(name="received", title="Bytes received since each start", unit="bytes", curves=curves("peer", "received")),
        Plot(name="round_bytes", title="Bytes sent in each round", unit="bytes", curves=curves("round", "sent")),
        Plot(name="round_seconds", title="Seconds that each round took", unit="s", curves=curves("round", "seconds")),
        Plot(name="merging_error", title="Error of merging", unit="relative", curves=curves("round", "merging_error")),
    ]  # fmt: skip
    return [plot for plot in plots if plot.curves]


def rows_of(metrics: Mapping[str, Sequence[Entry]]) -> list[tuple[str, ...]]:
    """A line for each peer, under COLUMNS."""
    return [_row(name, entries) for name, entries in metrics.items()]


COLUMNS = ("peer", "from", "hours", "rounds", "failed", "steps", "last loss", "best held out", "sent", "received")


def page(title: str, rows: Sequence[Sequence[str]], pictures: Sequence[tuple[Plot, bytes]]) -> str:
    """The page; `pictures` are PNGs. Names come from directories and are escaped."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in COLUMNS)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    figures = "".join(
        f'<figure><img alt="{html.escape(plot.title)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f"<figcaption>{html.escape(plot.title)}, {html.escape(plot.unit)}</figcaption></figure>"
        for plot, png in pictures
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><h1>{html.escape(title)}</h1>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"{figures}</body></html>\n"
    )


def write_report(directory: Path, out: Path, others: Sequence[Path] = ()) -> list[Path]:
    """Write the page to `out`, and a PNG of each plot beside it; returns all files, the page first. See `find_metrics`.

    Raises:
        BadData: there are no metrics, matplotlib is not installed, or a file cannot be written.
    """
    from swarm.reports.plots import draw

    metrics = find_metrics(directory, others)
    pictures = [(plot, draw(plot)) for plot in plots_of(metrics)]
    written = [out]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for plot, png in pictures:
            path = out.with_name(f"{out.stem}-{plot.name}.png")
            path.write_bytes(png)
            written.append(path)
        out.write_text(page(f"Run in {directory.resolve().name}", rows_of(metrics), pictures), encoding="utf-8")
    except OSError as error:
        raise BadData(f"the report cannot be written to {out} ({error.strerror}); choose another --out") from None
    return written


def _curve(name: str, entries: Sequence[Entry], kind: str, value: str, start: float) -> Curve:
    numbers = [(entry.time - start, entry.number(value)) for entry in entries if entry.kind == kind]
    points = [(at, number) for at, number in numbers if number is not None]
    every = -(-len(points) // _MAX_POINTS) or 1
    kept = points[::every] + ([points[-1]] if points and (len(points) - 1) % every else [])
    return Curve(label=name, seconds=[at for at, _ in kept], values=[number for _, number in kept])


def _row(name: str, entries: Sequence[Entry]) -> tuple[str, ...]:
    def numbers(kind: str, value: str) -> list[float]:
        found = [entry.number(value) for entry in entries if entry.kind == kind]
        return [number for number in found if number is not None]

    def shown(found: Sequence[float], words: str) -> str:
        return words.format(found[-1]) if found else ""

    rounds, losses, held_out = numbers("round", "round"), numbers("step", "loss"), numbers("evaluation", "loss")
    return (
        name,
        time.strftime("%Y-%m-%d %H:%M", time.gmtime(entries[0].time)),
        f"{(entries[-1].time - entries[0].time) / 3600:.2f}",
        str(len(rounds)),
        str(sum(entry.kind == "round_failed" for entry in entries)),
        shown(numbers("step", "step"), "{:.0f}"),
        shown(losses, "{:.4f}"),
        f"{min(held_out):.4f}" if held_out else "",
        shown(numbers("peer", "sent"), "{:,.0f}"),
        shown(numbers("peer", "received"), "{:,.0f}"),
    )
