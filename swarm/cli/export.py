"""`swarm export`: the trained adapter as a peft directory."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

import click

from swarm.cli.arguments import JOIN_HELP, PeerGiven, join_and, peer_fields, peer_options
from swarm.cli.report import screen
from swarm.options import ExportOptions


class _Given(PeerGiven):
    directory: str | None
    model: str | None
    left: tuple[Path, ...]
    best: bool


@click.command(
    epilog="""\b
Examples:
  swarm export tales/ tales-adapter
  swarm export tales/ tales-adapter --from /mnt/ann --from /mnt/bob      of a swarm that is no more
  swarm export tales/ tales-adapter --best                   by --eval-data of trainers on this machine
  python -c "from peft import PeftModel; PeftModel.from_pretrained(model, 'tales-adapter')" """,
    help=f"Write the newest adapter to DIRECTORY, as peft's PeftModel.from_pretrained reads it.\n\n{JOIN_HELP}",
)
@peer_options
@click.argument("directory", required=False, metavar="DIRECTORY")
@click.option(
    "--from",
    "left",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Export what peers left in their state directory, without a swarm; may be repeated.",
)
@click.option("--best", is_flag=True, help="Export the adapter with the lowest loss on a trainer's --eval-data here.")
@click.option("--model", help="A copy of the run's model on this machine: directory or GGUF file.")
def command(**given: Unpack[_Given]) -> None:
    """Parse, and export."""
    with screen("stopped; nothing was exported") as shown:
        if given["best"] and given["left"]:
            raise click.UsageError("--best and --from do not go together; --state DIR names another trainer's best")
        given["join"], directory = join_and("DIRECTORY", given["join"], given["directory"], given["lan"])
        options = ExportOptions(
            **peer_fields(given),
            directory=Path(directory),
            model=given["model"],
            left=given["left"],
            best=given["best"],
        )
        from swarm.quick_start import import_client

        import_client()
        from swarm.commands import run_export

        run_export(options, shown)
