"""`swarm train`: bring data to a run."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

import click

from blocks.spans import MAX_BLOCKS, parse_span
from swarm.cli.arguments import (
    JOIN_HELP,
    PeerGiven,
    check_peers,
    peer_fields,
    peer_options,
    quantization,
    quantize_option,
    track_option,
    wait_option,
    wire_format,
    wire_option,
)
from swarm.cli.report import screen
from swarm.options import TrainOptions

_FILE = click.Path(path_type=Path)


class _Given(PeerGiven):
    data: tuple[Path, ...]
    eval_data: tuple[Path, ...]
    label: tuple[str, ...]
    steps: int
    blocks: str
    behind_nat: bool
    device: str
    quantize: str
    keep_first: int
    avoid: tuple[str, ...]
    only: tuple[str, ...]
    model: str | None
    wait: float
    wire: str | None
    track: tuple[str, ...]


@click.command(
    epilog="""\b
Examples:
  swarm train tales/ --data tales.jsonl
  swarm train swarm1:gqJpZ... --data a.jsonl --data b.txt --eval-data held_out.jsonl --steps 200
  swarm train swarm1:gqJpZ... --data mails.jsonl --eval-data held_out.jsonl --label spam --label ham
  swarm train swarm1:gqJpZ... --data private.jsonl --keep-first 4 --only QmYyQ... --only QmZxP...
  swarm train swarm1:gqJpZ... --data private.jsonl --blocks 0:30""",
    help=f"""Train the run's adapter on your data, through the blocks that the peers hold.

{JOIN_HELP} Batch size, learning rate and the rest are the run's. The text stays here; hosts see activations,
which can tell them about it, the more the earlier the block. Use --only or --avoid to choose the hosts, --keep-first to
hold the first blocks here, or hold every block here with --blocks: then only adapters leave this machine. Behind a
router without a forwarded port, add --behind-nat: others then average with this peer, over connections that it makes,
and nobody waits for its blocks.""",
)
@peer_options
@click.option(
    "--data",
    type=_FILE,
    multiple=True,
    required=True,
    help=".jsonl, .parquet, .txt or hf:OWNER/NAME[:SPLIT]; may be repeated.",
)
@click.option(
    "--eval-data",
    type=_FILE,
    multiple=True,
    help="Held-out rows: their loss each round, here and over all trainers; with labels, accuracy, F1 and AUC.",
)
@click.option("--label", multiple=True, metavar="TEXT", help="A label that no row of --eval-data has here; repeatable.")
@click.option(
    "--steps",
    type=click.IntRange(0),
    default=0,
    help="Batches to bring; 0: what the run lacks of its total-samples.",
)
@click.option("--blocks", default="none", show_default=True, metavar="none|A:B", help="Hold these blocks here as well.")
@click.option(
    "--behind-nat",
    is_flag=True,
    help="With --blocks or --keep-first, where others cannot dial this machine: listen nowhere.",
)
@click.option(
    "--keep-first",
    type=click.IntRange(0, MAX_BLOCKS),
    default=0,
    metavar="K",
    help="Hold the first K blocks here; only activations that come out of them leave this machine.",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="For blocks held here.")
@quantize_option
@click.option("--avoid", multiple=True, metavar="PEER", help="Never send activations to this peer id.")
@click.option("--only", multiple=True, metavar="PEER", help="Send activations to these peer ids only.")
@wait_option(300)
@wire_option
@track_option
@click.option("--model", help="A copy of the run's model on this machine: directory or GGUF file.")
def command(**given: Unpack[_Given]) -> None:
    """Parse, and run the trainer."""
    with screen("stopped; the same command goes on where the data stood") as shown:
        if set(given["avoid"]) & set(given["only"]):
            raise click.UsageError("a peer is in both --avoid and --only; choose one")
        if given["keep_first"] and given["blocks"] != "none":
            raise click.UsageError("--keep-first K holds blocks 0:K here, --blocks others; give one of them")
        if given["label"] and not given["eval_data"]:
            raise click.UsageError("--label names labels of --eval-data; give that, too")
        options = TrainOptions(
            **peer_fields(given),
            data=given["data"],
            eval_data=given["eval_data"],
            labels=given["label"],
            steps=given["steps"],
            blocks=None if given["blocks"] == "none" else parse_span(given["blocks"], MAX_BLOCKS),
            behind_nat=given["behind_nat"],
            keep_first=given["keep_first"],
            device=given["device"],
            quantize=quantization(given["quantize"]),
            avoid=check_peers("--avoid", given["avoid"]),
            only=check_peers("--only", given["only"]),
            model=given["model"],
            wait_seconds=given["wait"],
            wire=wire_format(given["wire"]),
            track=given["track"],
        )
        from swarm.quick_start import import_client

        import_client()
        from swarm.commands import run_train

        run_train(options, shown)
