"""`swarm revoke`: put somebody out of a private run."""

from __future__ import annotations

from typing import Unpack

import click

from swarm.cli.arguments import PeerGiven, peer_fields, peer_options
from swarm.cli.report import screen
from swarm.options import RevokeOptions


class _Given(PeerGiven):
    who: str


@click.command(
    epilog="""\b
Examples:
  swarm revoke lab/ QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N
  swarm revoke lab/ 3f9a6c0d12e84b57              all whom an --anyone invitation let in""",
    help="""End the membership of WHO in the private run whose directory is JOIN.

WHO is a peer id, or the serial that `swarm invite` has said. Running peers end their streams within seconds. Whoever
came by an --anyone invitation can come again under a new id until its serial is revoked, too. A peer that was revoked
may be invited again.""",
)
@peer_options
@click.argument("who")
def command(**given: Unpack[_Given]) -> None:
    """Parse, and revoke."""
    with screen("stopped; the list in the run's directory is complete") as shown:
        options = RevokeOptions(**peer_fields(given), who=given["who"])
        from swarm.commands import run_revoke

        run_revoke(options, shown)
