"""Options that several commands share, and how they become values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar, cast

import click

from peers.wire_format import WireFormat
from swarm.cli.paths import cache_dir, state_root
from swarm.config import WIRE_FORMATS
from swarm.join_string import Join, RunDirectory, check_address, resolve_join

if TYPE_CHECKING:
    from blocks.quantize import Quantization

Command = TypeVar("Command", bound=Callable[..., None])

JOIN_HELP = (
    "JOIN is a join string (swarm1:…), an invitation (swarminvite1:…), a file that holds one, a directory made by "
    "`swarm init`, or a peer's state directory."
)


class PeerGiven(TypedDict):
    """What click hands to every command that enters a swarm."""

    join: str
    state: Path | None
    peer: tuple[str, ...]
    threads: int


class PeerFields(TypedDict):
    """The same as the fields of `swarm.options.PeerOptions`."""

    target: Join | RunDirectory
    state_root: Path
    cache_dir: Path
    state: Path | None
    peers: tuple[str, ...]
    threads: int


def peer_options(command: Command) -> Command:
    """Add JOIN, --state, --peer and --threads."""
    for add in (
        click.option(
            "--threads", type=click.IntRange(0, 1024), default=0, help="Threads for torch; 0: torch's choice."
        ),
        click.option("--peer", multiple=True, metavar="ADDR", help="Another peer to start from; may be repeated."),
        click.option(
            "--state", type=click.Path(path_type=Path), help="Directory for identity and checkpoints; else one per run."
        ),
        click.argument("join"),
    ):
        command = add(command)
    return command


def quantize_option(command: Command) -> Command:
    """Add --quantize."""
    add = click.option(
        "--quantize",
        type=click.Choice(["none", "int8", "nf4"]),
        default="none",
        show_default=True,
        help="Hold the frozen weights in 8 or 4 bits: less memory, less exact.",
    )
    return add(command)


def quantization(given: str) -> Quantization | None:
    """What --quantize asks for."""
    return None if given == "none" else cast("Quantization", given)


def wait_option(default_seconds: int) -> Callable[[Command], Command]:
    """Add --wait: a trainer can sit out a restart, a person who asks for a text wants to know soon."""
    return click.option(
        "--wait",
        type=click.FloatRange(1, 86400),
        default=default_seconds,
        show_default=True,
        metavar="SECONDS",
        help="How long to wait while nobody holds some block.",
    )


def wire_option(command: Command) -> Command:
    """Add --wire: how activations and gradients of this command travel."""
    return click.option(
        "--wire",
        type=click.Choice(WIRE_FORMATS),
        help="How activations travel: 8bit takes half the bytes of bf16 and is less exact; else as the run says.",
    )(command)


def wire_format(given: str | None) -> WireFormat | None:
    """What --wire says."""
    return None if given is None else WireFormat(given)


def peer_fields(given: PeerGiven) -> PeerFields:
    """What was given, resolved.

    Raises:
        BadJoinString: JOIN or an address is wrong.
    """
    return PeerFields(
        target=resolve_join(given["join"]),
        state_root=state_root(),
        cache_dir=cache_dir(),
        state=given["state"],
        peers=tuple(check_address(address) for address in given["peer"]),
        threads=given["threads"],
    )
