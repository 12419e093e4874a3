"""`swarm join`: hold blocks of a run's model for others."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Unpack

import click

from blocks.spans import MAX_BLOCKS, Span, parse_span
from swarm.cli.arguments import (
    JOIN_HELP,
    PeerGiven,
    peer_fields,
    peer_options,
    quantization,
    quantize_option,
    track_option,
)
from swarm.cli.report import screen
from swarm.cli.stopping import stop_at_end_of
from swarm.hosts.hours import parse_hours
from swarm.options import JoinOptions
from swarm.sizes import parse_bandwidth, parse_memory


class _Given(PeerGiven):
    blocks: str
    device: str
    dtype: str
    quantize: str
    host: str
    port: int
    announce: tuple[str, ...]
    cache_mb: int
    nickname: str
    lora_rank: int
    model: str | None
    keep_mb: int
    resume: tuple[Path, ...]
    max_blocks: int | None
    max_memory: str | None
    max_bandwidth: str | None
    hours: str | None
    track: tuple[str, ...]
    until_eof: bool


@click.command(
    epilog="""\b
Examples:
  swarm join tales/                                the run's first peer; prints the join string
  swarm join swarm1:gqJpZ... --blocks 0:15         hold the first half
  swarm join tales/ --lan tales                    and be found by its name on this network
  swarm join --lan tales                           find it, on another machine there
  swarm join swarm1:gqJpZ... --port 31330 --announce /ip4/203.0.113.7/tcp/31330
  swarm join swarm1:gqJpZ... --hours 22-07 --max-memory 4GB --max-bandwidth 20Mbit
  swarm join tales/ --resume /mnt/ann --resume /mnt/bob      start again from what a dead swarm left""",
    help=f"""Hold blocks of a run's model, train and serve them until stopped.

{JOIN_HELP} What it takes of this machine is yours to bound: --max-memory, --max-bandwidth, --hours; and `swarm pause`
lets it rest.""",
)
@peer_options
@click.option(
    "--blocks",
    default="auto",
    show_default=True,
    metavar="auto|A:B",
    help="Which blocks to hold; auto: what the swarm lacks most, now and later.",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--dtype", type=click.Choice(["auto", "bf16", "fp32"]), default="auto", help="To compute in; auto: the run's."
)
@quantize_option
@click.option("--host", default="0.0.0.0", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="TCP port to listen on; 0: any free one.")
@click.option("--announce", multiple=True, metavar="ADDR", help="Multiaddr by which others reach this peer.")
@click.option("--cache-mb", type=click.IntRange(1), default=512, show_default=True, help="Budget for KV caches, in MB.")
@click.option("--nickname", default="", help="A name for the status table.")
@click.option(
    "--lora-rank", type=click.IntRange(0), default=0, help="Train a smaller rank than the run's (merging 'power' only)."
)
@click.option("--max-blocks", type=click.IntRange(1), help="Hold so many blocks at most; which ones may change.")
@click.option("--max-memory", metavar="SIZE", help="For all of this process, such as 4GB; on a GPU, of its memory.")
@click.option("--max-bandwidth", metavar="RATE", help="What this peer sends at most, such as 20Mbit or 2.5MB/s.")
@track_option
@click.option("--hours", metavar="H-H", help="Take part only then, in local time: 22-07, or 22:30-07:15,12-13.")
@click.option("--model", help="A copy of the run's model on this machine: directory or GGUF file.")
@click.option(
    "--keep-mb", type=click.IntRange(0), default=1024, show_default=True, help="Disk for others' adapters, in MB."
)
@click.option(
    "--resume",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Go on from what dead peers left in their state directory, too; may be repeated.",
)
@click.option(
    "--until-eof", is_flag=True, help="End, as on SIGTERM, when standard input ends: for programs that start this one."
)
def command(**given: Unpack[_Given]) -> None:
    """Parse, and run the peer."""
    with screen("stopped; this peer's state is kept, so the same command goes on from here") as shown:
        if given["until_eof"]:
            stop_at_end_of(0)  # standard input
        options = JoinOptions(
            **peer_fields(given),
            blocks=_blocks(given["blocks"]),
            device=given["device"],
            dtype=given["dtype"],
            quantize=quantization(given["quantize"]),
            host=given["host"],
            port=given["port"],
            announce=given["announce"],
            cache_megabytes=given["cache_mb"],
            nickname=given["nickname"],
            lora_rank=given["lora_rank"],
            model=given["model"],
            keep_megabytes=given["keep_mb"],
            resume=given["resume"],
            max_blocks=given["max_blocks"],
            max_memory_bytes=None if given["max_memory"] is None else parse_memory(given["max_memory"]),
            max_send=math.inf if given["max_bandwidth"] is None else parse_bandwidth(given["max_bandwidth"]),
            track=given["track"],
            hours=None if given["hours"] is None else parse_hours(given["hours"]),
        )
        from swarm.quick_start import hosting

        with hosting():
            from swarm.commands import run_join

            run_join(options, shown)


def _blocks(text: str) -> Span | None:
    return None if text == "auto" else parse_span(text, MAX_BLOCKS)
