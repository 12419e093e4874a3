"""`swarm generate`: text from the run's model."""

from __future__ import annotations

from typing import Unpack

import click

from swarm.cli.arguments import (
    JOIN_HELP,
    FiniteRange,
    PeerGiven,
    join_and,
    peer_fields,
    peer_options,
    wait_option,
    wire_format,
    wire_option,
)
from swarm.cli.report import screen
from swarm.options import GenerateOptions


class _Given(PeerGiven):
    prompt: str | None
    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    adapter: str | None
    no_adapter: bool
    chat: bool | None
    speculate: str
    draft: str | None
    model: str | None
    wait: float
    wire: str | None


@click.command(
    epilog="""\b
Examples:
  swarm generate tales/ "Once upon a time" --raw
  swarm generate --lan tales "Once upon a time"
  swarm generate tales/ "Once upon a time" --adapter pirate         that the owner has published
  swarm generate swarm1:gqJpZ... "What is a swarm?" --temperature 0.8 --top-p 0.9 --max-tokens 200""",
    help=f"Continue PROMPT with the run's model and newest adapter, over the peers' blocks.\n\n{JOIN_HELP}",
)
@peer_options
@click.argument("prompt", required=False, metavar="PROMPT")
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True, help="New tokens at most.")
@click.option("--temperature", type=FiniteRange(0, 100), default=0.0, help="0 takes the likeliest token.")
@click.option("--top-p", type=FiniteRange(0, 1, min_open=True), default=1.0, help="Sample from this much probability.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Makes sampling repeatable.")
@click.option("--adapter", metavar="NAME", help="With a published adapter; default: the one that the run trains.")
@click.option("--no-adapter", is_flag=True, help="With the base model alone.")
@click.option(
    "--chat/--raw", "chat", default=None, help="As a chat turn, or as plain text; default: chat if the model can."
)
@click.option(
    "--speculate",
    type=click.Choice(["prompt", "off"]),
    default="prompt",
    show_default=True,
    help="Guess tokens from the text so far; the hosts verify several in one round trip.",
)
@click.option("--draft", metavar="MODEL", help="A small model with the same tokens, run here, that guesses instead.")
@wait_option(60)
@wire_option
@click.option("--model", help="A copy of the run's model on this machine: directory or GGUF file.")
def command(**given: Unpack[_Given]) -> None:
    """Parse, and generate."""
    with screen("stopped before the text was complete") as shown:
        if given["no_adapter"] and given["adapter"] is not None:
            raise click.UsageError("--adapter and --no-adapter do not go together")
        given["join"], prompt = join_and("PROMPT", given["join"], given["prompt"], given["lan"])
        options = GenerateOptions(
            **peer_fields(given),
            prompt=prompt,
            max_tokens=given["max_tokens"],
            temperature=given["temperature"],
            top_p=given["top_p"],
            seed=given["seed"],
            adapter=not given["no_adapter"] if given["adapter"] is None else given["adapter"],
            chat=given["chat"],
            lookup=given["speculate"] == "prompt",
            draft=given["draft"],
            model=given["model"],
            wait_seconds=given["wait"],
            wire=wire_format(given["wire"]),
        )
        from swarm.quick_start import import_client

        import_client()
        from swarm.commands import run_generate

        run_generate(options, shown)
