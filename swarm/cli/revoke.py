"""`swarm revoke`: put somebody out of a private run."""

from __future__ import annotations

from pathlib import Path

import click

from swarm.cli.arguments import peers_given, static_peer_options
from swarm.cli.paths import cache_dir, state_root
from swarm.cli.report import screen
from swarm.join_string import resolve_join
from swarm.options import RevokeOptions


@click.command(
    epilog="""\b
Examples:
  swarm revoke lab/ QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N
  swarm revoke lab/ 3f9a6c0d12e84b57              all whom an --anyone invitation let in""",
    help="""End the membership of WHO in the private run in RUN, the directory that `swarm init` made.

WHO is a peer id, or the serial that `swarm invite` has said. Running peers end their streams within seconds. Whoever
came by an --anyone invitation can come again under a new id until its serial is revoked, too. A peer that was revoked
may be invited again.""",
)
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("who")
@static_peer_options
def command(run: Path, who: str, peer: tuple[str, ...], peers_file: Path | None) -> None:
    """Parse, and revoke."""
    with screen("stopped; the list in the run's directory is complete") as shown:
        options = RevokeOptions(
            target=resolve_join(str(run)),
            state_root=state_root(),
            cache_dir=cache_dir(),
            peers=peers_given(peer, peers_file),
            who=who,
        )
        from swarm.commands import run_revoke

        run_revoke(options, shown)
