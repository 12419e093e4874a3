"""`swarm pause`: let the peers on this machine rest."""

from __future__ import annotations

import click

from swarm.cli.local_peers import TARGET_HELP, find_states, nobody_here
from swarm.cli.report import screen
from swarm.hosts.pause_file import is_hosting, say_pause


@click.command(
    epilog="""\b
Examples:
  swarm pause                  every peer of this machine under its usual place
  swarm pause swarm1:gqJpZ...
  swarm pause tales/
  swarm pause /srv/peer-a      the peer that was started with --state /srv/peer-a""",
    help=f"""Let the peers on this machine that hold blocks rest: each tells the swarm, finishes what is in flight, and
then takes no work and no part in rounds until `swarm resume`. Process, model and state stay.

{TARGET_HELP}""",
)
@click.argument("target", required=False)
def command(target: str | None) -> None:
    """Parse, and tell them."""
    with screen() as shown:
        hosting = [state for state in find_states(target) if is_hosting(state)]
        if not hosting:
            raise nobody_here(target)
        for state in hosting:
            say_pause(state)
            shown.result(f"pausing the peer in {state}")
