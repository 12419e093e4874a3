"""`swarm status`: who holds what, and how far the run is."""

from __future__ import annotations

from typing import Unpack

import click

from swarm.cli.arguments import JOIN_HELP, FiniteRange, PeerGiven, peer_fields, peer_options
from swarm.cli.report import screen
from swarm.options import StatusOptions


class _Given(PeerGiven):
    json: bool
    watch: float


@click.command(
    epilog="""\b
Examples:
  swarm status tales/
  swarm status swarm1:gqJpZ... --watch 2
  swarm status swarm1:gqJpZ... --json""",
    help=f"Show blocks by peers, the round, tokens/s and who trains.\n\n{JOIN_HELP}",
)
@peer_options
@click.option("--json", is_flag=True, help="One JSON object instead of a table.")
@click.option("--watch", type=FiniteRange(0, 86400), default=0.0, metavar="SECONDS", help="Show it again and again.")
def command(**given: Unpack[_Given]) -> None:
    """Parse, and look."""
    with screen("stopped watching") as shown:
        options = StatusOptions(**peer_fields(given), json=given["json"], watch_seconds=given["watch"])
        from swarm.commands import run_status

        run_status(options, shown)
