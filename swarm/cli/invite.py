"""`swarm invite`: let somebody into a private run."""

from __future__ import annotations

from pathlib import Path

import click

from peers.private.membership import Role
from swarm.cli.arguments import FiniteRange
from swarm.cli.report import screen
from swarm.options import InviteOptions


@click.command(
    epilog="""\b
Examples:
  swarm invite lab/ --for QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N
  swarm invite lab/ --for QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N --role trainer --days 7
  swarm invite lab/ --anyone --role client --days 1""",
    help="""Print one line by which a machine enters the private run in RUN: `swarm join LINE` there, or train, generate
and so on.

PEER_ID is what `swarm id` prints on that machine; the line is of no use to any other. A host may do everything; a
trainer may train and generate; a client may generate, export and look. --anyone admits whoever has the line, until it
expires or is revoked.""",
)
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--for", "peer", metavar="PEER_ID", help="The machine that is invited.")
@click.option("--anyone", is_flag=True, help="Whoever has the line can enter until it expires.")
@click.option("--role", type=click.Choice([str(role) for role in Role]), default="host", show_default=True)
@click.option("--days", type=FiniteRange(0, 36500, min_open=True), default=30.0, show_default=True)
def command(run: Path, peer: str | None, anyone: bool, role: str, days: float) -> None:
    """Parse, and print the invitation."""
    if (peer is not None) == anyone:
        raise click.UsageError("give --for PEER_ID, or --anyone")
    with screen() as shown:
        from swarm.commands import run_invite

        run_invite(InviteOptions(directory=run, peer=peer, role=Role(role), days=days), shown)
