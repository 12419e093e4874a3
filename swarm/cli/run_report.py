"""`swarm report`: what peers measured, as one page with plots."""

from __future__ import annotations

from pathlib import Path

import click

from swarm.cli.report import screen


@click.command(
    "report",
    epilog="""\b
Examples:
  swarm report tales/
  swarm report ~/.local/share/swarmtune --out report.html
  swarm report /mnt/ann --out ann.html""",
)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default="report.html",
    show_default=True,
    help="The page; a PNG of each plot is written beside it.",
)
def command(directory: Path, out: Path) -> None:
    """Draw what the peers with their state in DIRECTORY have measured: loss, rounds, peers, speed and bytes over time.

    DIRECTORY is a run's, a peer's (--state), or one that has several in it. Needs matplotlib.
    """
    with screen("stopped; the report may be incomplete") as shown:
        from swarm.run_report import write_report

        shown.now("drawing")
        page, *pictures = write_report(directory, out)
        shown.say(f"{len(pictures)} plots, each also as a PNG beside the page")
        shown.result(str(page))
