"""`swarm serve`: the run's model for applications, as an OpenAI-compatible API, and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

import click

from swarm.cli.arguments import (
    JOIN_HELP,
    ServeGiven,
    several_fields,
    several_peer_options,
    wait_option,
    wire_format,
    wire_option,
)
from swarm.cli.report import screen
from swarm.options import ServeOptions


class _Given(ServeGiven):
    host: str
    port: int
    api_keys: Path | None
    requests_per_minute: int
    texts: int
    queue: int
    max_tokens: int
    local_hosts: int
    allow_host: tuple[str, ...]
    speculate: str
    model: str | None
    wait: float
    wire: str | None


@click.command(
    epilog="""\b
Examples:
  swarm serve tales/                                         then open http://127.0.0.1:8000
  swarm serve lab/ --local-hosts 3                           a group of three hosts on this machine alone
  swarm serve swarm1:gqJpZ... --port 9000 --host 0.0.0.0 --api-keys keys.toml
  swarm serve swarm1:gqJpZ... swarm1:kPq3x...                two adapters, chosen by the run's name
  curl http://127.0.0.1:8000/v1/models
\b
keys.toml has a table for each name:
  [ann]
  key = "sk-..."                 # 16 or more characters; try: openssl rand -hex 24
  requests_per_minute = 60       # if it differs from --requests-per-minute
  concurrent = 4                 # requests at the same time""",
    help=f"""Serve text from the swarm over HTTP: OpenAI's API under /v1, a page to chat and to watch the swarm,
/healthz, and /metrics for Prometheus. The adapter of each JOIN is a model with the run's name, its base model is one
without it.

{JOIN_HELP}""",
)
@several_peer_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one.")
@click.option(
    "--allow-host",
    multiple=True,
    metavar="NAME",
    help="A name by which it may be asked, as of a proxy before it; '*': any. Addresses and localhost always may.",
)
@click.option(
    "--api-keys",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Who may ask, as TOML (see below); else anybody may.",
)
@click.option(
    "--requests-per-minute", type=click.IntRange(0, 1_000_000), default=0, help="Of each key or address; 0: no bound."
)
@click.option("--texts", type=click.IntRange(1, 1024), default=64, show_default=True, help="Texts written at once.")
@click.option("--queue", type=click.IntRange(0, 4096), default=128, show_default=True, help="Texts that may wait.")
@click.option(
    "--max-tokens", type=click.IntRange(1, 1_000_000), default=4096, show_default=True, help="Of one answer, at most."
)
@click.option(
    "--local-hosts",
    type=click.IntRange(0, 64),
    default=0,
    metavar="N",
    help="Start N hosts of the run on this machine, too; JOIN is then the directory that `swarm init` made.",
)
@click.option(
    "--speculate",
    type=click.Choice(["prompt", "off"]),
    default="prompt",
    show_default=True,
    help="Guess tokens from the text so far, while few texts are written: fewer round trips.",
)
@wait_option(20)
@wire_option
@click.option("--model", help="A copy of the runs' base model on this machine: directory or GGUF file.")
def command(**given: Unpack[_Given]) -> None:
    """Parse, and serve."""
    with screen("stopped serving") as shown:
        options = ServeOptions(
            **several_fields(given),
            host=given["host"],
            port=given["port"],
            keys=given["api_keys"],
            requests_per_minute=given["requests_per_minute"],
            texts=given["texts"],
            queue=given["queue"],
            max_tokens=given["max_tokens"],
            local_hosts=given["local_hosts"],
            allow_hosts=given["allow_host"],
            lookup=given["speculate"] == "prompt",
            model=given["model"],
            wait_seconds=given["wait"],
            wire=wire_format(given["wire"]),
        )
        from swarm.quick_start import import_client

        import_client()
        from swarm.commands import run_serve

        run_serve(options, shown)
