"""`swarm publish`: finished adapters beside the one that the run trains."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict, Unpack

import click

from swarm.cli.arguments import FiniteRange, peers_given, static_peer_options
from swarm.cli.paths import cache_dir, state_root
from swarm.cli.report import screen
from swarm.join_string import resolve_join
from swarm.options import PublishOptions


class _Given(TypedDict):
    run: Path
    adapter: Path | None
    name: str | None
    withdraw: str | None
    shows: bool
    wait: float
    model: str | None
    peer: tuple[str, ...]
    peers_file: Path | None


@click.command(
    epilog="""\b
Examples:
  swarm publish tales/ pirate-adapter --name pirate
  swarm generate tales/ "Once upon a time" --adapter pirate
  swarm publish tales/ --list
  swarm publish tales/ --withdraw pirate""",
    help="""Have the hosts of RUN, the directory that `swarm init` made, serve the adapter in ADAPTER as NAME.

ADAPTER is what `swarm export` writes, or peft's save_pretrained: a LoRA for the run's model, of the run's rank or a
smaller one. Applications choose it by NAME. This command stays until all hosts have it; later ones fetch it from these.
An adapter of the same NAME is replaced.""",
)
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("adapter", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--name", metavar="NAME", help="By which it is asked for: a-z, 0-9, '.', '_', '-'.")
@click.option("--withdraw", metavar="NAME", help="Have hosts serve that adapter no more.")
@click.option("--list", "shows", is_flag=True, help="Show what is published, and how many hosts serve it.")
@click.option(
    "--wait",
    type=FiniteRange(0, 86400),
    default=300,
    show_default=True,
    metavar="SECONDS",
    help="How long to stay at most until all hosts have it.",
)
@click.option("--model", help="A copy of the run's model on this machine: directory or GGUF file.")
@static_peer_options
def command(**given: Unpack[_Given]) -> None:
    """Parse, and publish."""
    with screen("stopped; hosts that lack the adapter fetch it from those that have it") as shown:
        directory, name, withdrawn = given["adapter"], given["name"], given["withdraw"]
        asked = [directory is not None or name is not None, withdrawn is not None, given["shows"]]
        if sum(asked) != 1 or (directory is None) != (name is None):
            raise click.UsageError("Give ADAPTER and --name NAME, or --withdraw NAME, or --list.")
        options = PublishOptions(
            target=resolve_join(str(given["run"])),
            state_root=state_root(),
            cache_dir=cache_dir(),
            peers=peers_given(given["peer"], given["peers_file"]),
            directory=directory,
            name=name,
            withdraw=withdrawn,
            model=given["model"],
            wait_seconds=given["wait"],
        )
        from swarm.adapters.commands import run_publish

        run_publish(options, shown)
