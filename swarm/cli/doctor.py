"""`swarm doctor`: check what usually goes wrong, and say what to do."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from swarm.cli.arguments import JOIN_HELP
from swarm.cli.paths import cache_dir, state_root
from swarm.cli.report import screen
from swarm.join_string import Join, RunDirectory, resolve_join

if TYPE_CHECKING:
    from swarm.peer import Peer


@click.command(
    epilog="""\b
Examples:
  swarm doctor                                     this machine: packages, port, p2pd, clock, disk, multicast
  swarm doctor --port 31330                        the port that you forward
  swarm doctor swarm1:gqJpZ...                     and whether that run's hosts answer from here""",
    help=f"""Check what usually goes wrong, and say in one line each what to do. Ends with status 1 if something is bad.

{JOIN_HELP} Without it, only this machine is looked at.""",
)
@click.argument("join", required=False)
@click.option("--host", default="0.0.0.0", show_default=True, help="Address that a peer would listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="TCP port for it; 0: any free one.")
@click.option("--state", type=click.Path(path_type=Path), help="Directory for its state; else one per run.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def command(join: str | None, host: str, port: int, state: Path | None, as_json: bool) -> None:
    """Parse, and check."""
    with screen() as shown:
        target = None if join is None else resolve_join(join)
        shown.now("looking at this machine")
        from swarm.doctor import Place, Verdict, examine

        place = Place(host=host, port=port, directories=(state or state_root(), cache_dir()))
        found = []
        for finding in examine(place, None if target is None else partial(_enter, target, state)):
            shown.now(f"{finding.check}: {finding.words}")
            found.append(finding)
        if as_json:
            shown.data({"findings": [finding.to_plain() for finding in found]})
        else:
            rows = [(finding.check, finding.verdict, finding.words, finding.remedy) for finding in found]
            shown.table("this machine as a peer", ("check", "", "what is", "what to do"), rows)
    if any(finding.verdict is Verdict.BAD for finding in found):
        raise SystemExit(1)


def _enter(target: Join | RunDirectory, state: Path | None) -> Peer:
    from peers.config import NetworkConfig
    from swarm.peer import Peer, PeerConfig

    network = NetworkConfig(client_mode=True, start_seconds=10.0)
    return Peer.enter(target, PeerConfig(state_root=state_root(), cache_dir=cache_dir(), state=state, network=network))
