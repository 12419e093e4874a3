"""`swarm doctor`: check what usually goes wrong, and say what to do."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import click

from peers.network import PeerId
from swarm.cli.arguments import JOIN_HELP, PeerGiven, peer_fields
from swarm.cli.paths import cache_dir, state_root
from swarm.cli.report import screen
from swarm.join_string import check_address

if TYPE_CHECKING:
    from swarm.peer import Peer


class _Given(TypedDict):
    join: str | None
    host: str
    port: int
    announce: tuple[str, ...]
    peer: tuple[str, ...]
    state: Path | None
    as_json: bool


@click.command(
    epilog="""\b
Examples:
  swarm doctor                                     this machine: packages, port, p2pd, clock, disk, multicast
  swarm doctor --port 31330                        the port that you forward
  swarm doctor swarm1:gqJpZ... --port 31330        and whether that run's hosts answer, and can dial this machine
  swarm doctor lab/ --peer /ip4/203.0.113.7/tcp/31330/p2p/12D3...        whether this one can""",
    help=f"""Check what usually goes wrong, and say in one line each what to do. Ends with status 1 if something is bad.

{JOIN_HELP} Without it, only this machine is looked at; with it, peers of the run are asked
to dial this machine, too.""",
)
@click.argument("join", required=False)
@click.option("--host", default="0.0.0.0", show_default=True, help="Address that a peer would listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="TCP port for it; 0: any free one.")
@click.option("--announce", multiple=True, metavar="ADDR", help="Multiaddr by which others would reach it.")
@click.option("--peer", multiple=True, metavar="ADDR", help="A peer of JOIN's run to start from, and to be dialled by.")
@click.option("--state", type=click.Path(path_type=Path), help="Directory for its state; else one per run.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def command(**given: Unpack[_Given]) -> None:
    """Parse, and check."""
    join, state = given["join"], given["state"]
    if join is None and given["peer"]:
        raise click.UsageError("Missing argument 'JOIN': --peer names a peer of its run.")
    with screen() as shown:
        ask_first = [PeerId(check_address(address).rpartition("/")[2]) for address in given["peer"]]
        shown.now("looking at this machine")
        from swarm.doctor import Place, Verdict, examine

        place = Place(
            host=given["host"],
            port=given["port"],
            directories=(state or state_root(), cache_dir()),
            announce=given["announce"],
        )
        found = []
        for finding in examine(place, None if join is None else partial(_enter, given), ask_first):
            shown.now(f"{finding.check}: {finding.words}")
            found.append(finding)
        if given["as_json"]:
            shown.data({"findings": [finding.to_plain() for finding in found]})
        else:
            rows = [(finding.check, finding.verdict, finding.words, finding.remedy) for finding in found]
            shown.table("this machine as a peer", ("check", "", "what is", "what to do"), rows)
    if any(finding.verdict is Verdict.BAD for finding in found):
        raise SystemExit(1)


def _enter(given: _Given) -> Peer:
    from peers.config import NetworkConfig
    from swarm.peer import Peer
    from swarm.peer_config import PeerConfig

    known = PeerGiven(
        join=given["join"], state=given["state"], peer=given["peer"], peers_file=None, lan=None, threads=0
    )
    fields = peer_fields(known)
    network = NetworkConfig(client_mode=True, start_seconds=10.0, bootstrap=fields["peers"])
    config = PeerConfig(
        state_root=fields["state_root"], cache_dir=fields["cache_dir"], state=fields["state"], network=network
    )
    return Peer.enter(fields["target"], config)
