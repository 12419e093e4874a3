"""Options that several commands share, and how they become values."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar, cast

import click

from peers.records import is_peer_id
from peers.streams.wire_format import WireFormat
from swarm.cli.paths import cache_dir, state_root
from swarm.config import WIRE_FORMATS
from swarm.join_string import Join, RunDirectory, check_address, resolve_join
from swarm.reports.trackers import TRACKERS

if TYPE_CHECKING:
    from blocks.quantize import Quantization

Command = TypeVar("Command", bound=Callable[..., None])

ANY_HOST = "0.0.0.0"
LAN_PREFIX = "lan:"
JOIN_HELP = (
    "JOIN is a join string (swarm1:…), an invitation (swarminvite1:…), a file that holds one, a directory made by "
    "`swarm init`, a peer's state directory, or lan:NAME for the run of that name on this network."
)


class FiniteRange(click.FloatRange):
    """A number from a range: NaN, which lies in all ranges of click, and infinity are none."""

    def convert(self, value: float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """As click does it."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a number.", param, ctx)
        return number


class PeerGiven(TypedDict):
    """What click hands to every command that enters a swarm."""

    join: str | None
    state: Path | None
    peer: tuple[str, ...]
    peers_file: Path | None
    lan: str | None
    threads: int


class PeerFields(TypedDict):
    """The same as the fields of `swarm.options.PeerOptions`."""

    target: Join | RunDirectory
    state_root: Path
    cache_dir: Path
    state: Path | None
    peers: tuple[str, ...]
    threads: int
    lan: str | None


class ServeGiven(TypedDict):
    """What click hands to a command that enters several swarms."""

    join: tuple[str, ...]
    state: Path | None
    peer: tuple[str, ...]
    peers_file: Path | None
    lan: str | None
    threads: int


class SeveralFields(PeerFields):
    """The same as the fields of `swarm.options.PeerOptions`, and the other swarms."""

    others: tuple[Join | RunDirectory, ...]


def peer_options(command: Command) -> Command:
    """Add JOIN, --state, --peer, --peers-file, --lan and --threads."""
    return _peer_options(command, click.argument("join", required=False))


def static_peer_options(command: Command) -> Command:
    """Add --peer and --peers-file."""
    for add in (
        click.option(
            "--peers-file",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="More of them: addresses or join strings, one a line.",
        ),
        click.option("--peer", multiple=True, metavar="ADDR", help="Another peer to start from; may be repeated."),
    ):
        command = add(command)
    return command


def peers_given(peers: tuple[str, ...], peers_file: Path | None) -> tuple[str, ...]:
    """The addresses that --peer and --peers-file say.

    Raises:
        BadJoinString, BadLan: one is wrong, or the file cannot be read.
    """
    addresses = tuple(check_address(address) for address in peers)
    if peers_file is None:
        return addresses
    from swarm.lan.discovery import read_peers_file

    return addresses + read_peers_file(peers_file)


def several_peer_options(command: Command) -> Command:
    """The same for one JOIN or more; --state then has a directory for each run."""
    return _peer_options(command, click.argument("join", nargs=-1))


def _peer_options(command: Command, join: Callable[[Command], Command]) -> Command:
    for add in (
        click.option(
            "--threads", type=click.IntRange(0, 1024), default=0, help="Threads for torch; 0: torch's choice."
        ),
        static_peer_options,
        click.option(
            "--lan",
            metavar="NAME",
            help="Find, and be found by, peers on this network by this name; no JOIN needed.",
        ),
        click.option(
            "--state", type=click.Path(path_type=Path), help="Directory for identity and checkpoints; else one per run."
        ),
        join,
    ):
        command = add(command)
    return command


def join_and(name: str, join: str | None, word: str | None, lan: str | None) -> tuple[str | None, str]:
    """JOIN, and the argument `name` behind it. With --lan one word alone is not JOIN but that.

    Raises:
        click.UsageError: it is missing.
    """
    if word is None and lan is not None:
        join, word = None, join
    if word is None:
        raise click.UsageError(f"Missing argument '{name}'.")
    return join, word


def check_peers(option: str, peers: tuple[str, ...]) -> frozenset[str]:
    """The peers that an option names, each by its id.

    Raises:
        click.UsageError: one cannot be an id, so that it would never be met.
    """
    for peer in peers:
        if not is_peer_id(peer):
            raise click.UsageError(f"{option} has {peer!r:.80}; use a peer id, as `swarm status` shows them")
    return frozenset(peers)


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
        type=FiniteRange(1, 86400),
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
    """What was given, resolved. Without JOIN, the run of a group is looked for on this machine's network.

    Raises:
        click.UsageError: neither JOIN nor --lan.
        BadJoinString: JOIN or an address is wrong.
        BadLan: the group's name is, or nobody of it answers.
    """
    peers = peers_given(given["peer"], given["peers_file"])
    join, lan = given["join"], given["lan"]
    if join is not None and join.startswith(LAN_PREFIX):
        lan, join = join.removeprefix(LAN_PREFIX), None
    target, near = _target(join, lan, peers, str(given.get("host", ANY_HOST)))
    return PeerFields(
        target=target,
        state_root=state_root(),
        cache_dir=cache_dir(),
        state=given["state"],
        peers=(*peers, *near),
        threads=given["threads"],
        lan=lan,
    )


def track_option(command: Command) -> Command:
    """Add --track."""
    return click.option(
        "--track",
        multiple=True,
        type=click.Choice(TRACKERS),
        help="Send metrics there, too, besides metrics.jsonl in the state directory; may be repeated.",
    )(command)


def _target(
    join: str | None, lan: str | None, peers: tuple[str, ...], host: str
) -> tuple[Join | RunDirectory, tuple[str, ...]]:
    """What is entered, and peers of it that are near."""
    if lan is None:
        if join is None:
            raise click.UsageError("Missing argument 'JOIN', or --lan NAME to find the run on this network.")
        return resolve_join(join), ()
    from swarm.lan.records import addresses_of, check_group

    check_group(lan)
    if join is None:
        from swarm.lan.discovery import find_run

        click.echo(f"looking for '{lan}' on this network", err=True)
        return find_run(lan, peers, host=host), ()
    target = resolve_join(join)
    if not isinstance(target, Join):
        return target, ()  # it may be the first
    from swarm.lan.discovery import search

    return target, addresses_of(search(lan, host=host), target.run_id)


def several_fields(given: ServeGiven) -> SeveralFields:
    """As `peer_fields`, for several JOINs.

    Raises:
        BadJoinString: a JOIN or an address is wrong.
        BadLan: a group's name is, or nobody of it answers.
    """
    first, *others = given["join"] or (None,)
    one = PeerGiven(
        join=first,
        state=given["state"],
        peer=given["peer"],
        peers_file=given["peers_file"],
        lan=given["lan"],
        threads=given["threads"],
    )
    return SeveralFields(**peer_fields(one), others=tuple(_other(each) for each in others if each))


def _other(join: str) -> Join | RunDirectory:
    if not join.startswith(LAN_PREFIX):
        return resolve_join(join)
    return _target(None, join.removeprefix(LAN_PREFIX), (), ANY_HOST)[0]
