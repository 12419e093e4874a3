"""`swarm resume`: the peers on this machine take part again."""

from __future__ import annotations

import click

from swarm.cli.local_peers import TARGET_HELP, find_states, nobody_here
from swarm.cli.report import screen
from swarm.hosts.pause_file import PAUSE_NAME, is_hosting, say_resume


@click.command(
    epilog="""\b
Examples:
  swarm resume
  swarm resume swarm1:gqJpZ...
  swarm resume /srv/peer-a""",
    help=f"""Let the peers that `swarm pause` stopped take part again: each catches up with the swarm first. Outside its
--hours a peer stays paused until they begin.

{TARGET_HELP}""",
)
@click.argument("target", required=False)
def command(target: str | None) -> None:
    """Parse, and tell them."""
    with screen() as shown:
        found = [state for state in find_states(target) if is_hosting(state) or (state / PAUSE_NAME).exists()]
        if not found:
            raise nobody_here(target)
        for state in found:
            say_resume(state)
            shown.result(f"{'resuming the peer in' if is_hosting(state) else 'no longer paused when started:'} {state}")
