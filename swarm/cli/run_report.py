"""`swarm report`: what peers measured, as one page with plots."""

from __future__ import annotations

from pathlib import Path

import click

from swarm.cli.paths import state_root
from swarm.cli.report import screen
from swarm.config_file import CONFIG_NAME
from swarm.join_string import resolve_join, target_run_id
from swarm.state import states_of


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

    DIRECTORY is a run's, a peer's (--state), or one that has several in it. A run's stands for all its peers on this
    machine whose state is in the usual place, as trainers' is. Needs matplotlib.
    """
    with screen("stopped; the report may be incomplete") as shown:
        from swarm.reports.run_report import write_report

        shown.now("drawing")
        page, *pictures = write_report(directory, out, _elsewhere(directory))
        shown.say(f"{len(pictures)} plots, each also as a PNG beside the page")
        shown.result(str(page))


def _elsewhere(directory: Path) -> list[Path]:
    """Of a run's directory: the states of its peers on this machine that do not keep theirs in it."""
    if not (directory / CONFIG_NAME).is_file():
        return []
    return states_of(state_root(), target_run_id(resolve_join(str(directory))))
