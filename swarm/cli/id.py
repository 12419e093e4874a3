"""`swarm id`: this machine's peer id, in all private runs or in one run."""

from __future__ import annotations

from pathlib import Path

import click

from swarm.cli.arguments import JOIN_HELP
from swarm.cli.paths import state_root
from swarm.cli.report import screen
from swarm.join_string import RunDirectory, own_state, resolve_join, target_run_id
from swarm.state import IDENTITY_NAME, state_path


@click.command(
    epilog="""\b
Examples:
  swarm id                                 for `swarm invite … --for`
  swarm id tales/
  swarm id --state /srv/peer-a""",
    help=f"""Print the peer id by which others know this machine; it is made if need be.

Without JOIN it is the one that the owner of a private run invites (`swarm invite`). With JOIN it is that of the run's
first peer on this machine; name another by --state.

{JOIN_HELP}""",
)
@click.argument("join", required=False)
@click.option("--state", type=click.Path(path_type=Path), help="The state directory of the peer.")
def command(join: str | None, state: Path | None) -> None:
    """Parse, and print the id."""
    if join is not None and state is not None:
        raise click.UsageError("give JOIN or --state, not both")
    with screen() as shown:
        from peers.identity import load_or_create

        path = state if state is not None else state_root() if join is None else _state_of(join)
        shown.result(load_or_create(path / IDENTITY_NAME).peer)


def _state_of(join: str) -> Path:
    """Where `swarm join` with the same words keeps its state, if it is the only peer of the run on this machine."""
    target = resolve_join(join)
    if isinstance(target, RunDirectory):
        return own_state(target)
    return state_path(state_root(), target_run_id(target))
