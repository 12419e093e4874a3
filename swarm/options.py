"""What each command is asked to do, as plain values: the command line fills these in, swarm.commands acts on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from blocks.spans import Span
from peers.private.membership import Role
from peers.streams.wire_format import WireFormat
from swarm.hosts.hours import Hours
from swarm.join_string import Join, RunDirectory

if TYPE_CHECKING:
    from blocks.quantize import Quantization


class Screen(Protocol):
    """Where a command's words go. The command line shows them; a library or a test collects them."""

    def say(self, line: str) -> None:
        """One finished line for a person."""

    def result(self, line: str) -> None:
        """One line of what was asked for, such as the join string; a pipe gets only these."""

    def now(self, line: str) -> None:
        """What is going on; replaced by the next `now` where the screen can."""

    def stream(self, piece: str) -> None:
        """A piece of generated text, shown at once and without a line break."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, below: bool = False) -> None:
        """A table, `below` the one before; or else in the place of all before it where the screen can."""

    def data(self, value: Mapping[str, object]) -> None:
        """One JSON object for a program, on one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerOptions:
    """What every command that enters a swarm needs.

    `state` is a directory chosen by hand; otherwise the first free one under `state_root` (swarm.state.claim_state).
    `peers` are multiaddrs tried before those of `target`. `threads` is for torch; 0 leaves torch's own choice. `lan` is
    the group under which this peer looks for others on its network by mDNS, and is found.
    """

    target: Join | RunDirectory
    state_root: Path
    cache_dir: Path
    state: Path | None = None
    peers: tuple[str, ...] = ()
    threads: int = 0
    lan: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinOptions(PeerOptions):
    """`swarm join`: hold blocks until stopped. `blocks` None lets the peer choose; `port` 0 takes a free one.

    `cache_megabytes` is the budget for KV caches. `model` is a local copy of the run's model, checked by fingerprint.
    `dtype` is auto (the run decides), bf16 or fp32; `device` is auto, cpu or cuda. `quantize` stores the
    frozen weights in 8 or 4 bits. `lora_rank` 0 is the run's; a smaller one needs a run that merges by `power`.
    `keep_megabytes` of disk are for units that others hold; those that dead peers left in `resume` are taken over.
    `max_send` is in bytes per second; `hours` are when this peer takes part. None: no bound.
    `track` names programs that get the metrics, too (swarm.reports.trackers).
    """

    blocks: Span | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantize: Quantization | None = None
    host: str = "0.0.0.0"
    port: int = 0
    announce: tuple[str, ...] = ()
    cache_megabytes: int = 512
    nickname: str = ""
    lora_rank: int = 0
    model: str | None = None
    keep_megabytes: int = 1024
    resume: tuple[Path, ...] = ()
    max_blocks: int | None = None
    max_memory_bytes: int | None = None
    max_send: float = math.inf
    hours: Hours | None = None
    track: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions(PeerOptions):
    """`swarm train`: bring data. `steps` 0 is as many as are missing to the run's `total_samples`.

    `avoid` and `only` are peer ids that this trainer never, or exclusively, routes through. `wait_seconds` is how long
    it waits while some block has no live holder. `blocks` are held by this peer too, on `device`; where they are all,
    it trains through itself, and only adapters leave it. The first `keep_first` blocks it holds, and nobody else gets
    work for them. Others use its blocks too, unless it is `behind_nat` and they cannot. `wire` is how activations
    travel; None: as the run says. `track` names programs that get the metrics, too (swarm.reports.trackers). `labels`
    may be chosen for rows of `eval_data` besides those that are seen there.
    """

    data: tuple[Path, ...]
    blocks: Span | None = None
    behind_nat: bool = False
    keep_first: int = 0
    device: str = "auto"
    quantize: Quantization | None = None
    eval_data: tuple[Path, ...] = ()
    labels: tuple[str, ...] = ()
    steps: int = 0
    avoid: frozenset[str] = frozenset()
    only: frozenset[str] = frozenset()
    model: str | None = None
    wait_seconds: float = 300.0
    wire: WireFormat | None = None
    track: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions(PeerOptions):
    """`swarm generate`: `temperature` 0 is greedy; `adapter` is that of the run (True), none (False), or the name of a
    published one; `chat` None: if the model can.

    Tokens are guessed ahead by the model `draft` where one is named, else from the text so far if `lookup` says so.
    `wait_seconds` is how long to wait while some block has no live holder. `wire` is how activations travel; None: as
    the run says.
    """

    prompt: str
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    adapter: bool | str = True
    chat: bool | None = None
    lookup: bool = True
    draft: str | None = None
    model: str | None = None
    wait_seconds: float = 60.0
    wire: WireFormat | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions(PeerOptions):
    """`swarm serve`: text from `target` and `others` over HTTP, on `host` and `port` (0: any free one).

    `keys` is a file of API keys; without one anybody may ask. `requests_per_minute` bounds each key, or each address;
    0: no bound. `texts` are written at once, and `queue` more wait. `wait_seconds` is how long a request waits while
    some block has no live holder. `local_hosts` host processes of the first run are started on this machine. Beside
    addresses and this machine's names, it may be asked by the names `allow_hosts`.
    """

    others: tuple[Join | RunDirectory, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    keys: Path | None = None
    requests_per_minute: int = 0
    texts: int = 64
    queue: int = 128
    max_tokens: int = 4096
    lookup: bool = True
    local_hosts: int = 0
    allow_hosts: tuple[str, ...] = ()
    model: str | None = None
    wait_seconds: float = 20.0
    wire: WireFormat | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusOptions(PeerOptions):
    """`swarm status`: who holds what. `watch_seconds` 0 shows it once."""

    json: bool = False
    watch_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions(PeerOptions):
    """`swarm export`: the newest complete adapter as a peft directory at `directory`, which must be new or empty.

    It is what the swarm holds, or, without entering it, what peers left in the directories `left`, or the best that
    trainers on this machine have evaluated.
    """

    directory: Path
    model: str | None = None
    left: tuple[Path, ...] = ()
    best: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishOptions(PeerOptions):
    """`swarm publish`: have hosts serve the adapter in `directory` as `name`, or no more the one named `withdraw`; or
    neither, and show what is published. `wait_seconds` is how long to stay until hosts have it.
    """

    directory: Path | None = None
    name: str | None = None
    withdraw: str | None = None
    model: str | None = None
    wait_seconds: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class InviteOptions:
    """`swarm invite`: let `peer` into the private run in `directory`, or, where it is None, whoever has the line."""

    directory: Path
    peer: str | None
    role: Role
    days: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RevokeOptions(PeerOptions):
    """`swarm revoke`: `who` is a peer id, or the serial of an invitation."""

    who: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """`swarm demo`: `num_peers` host processes on this machine; the result goes to `json_file` where given."""

    cache_dir: Path
    num_peers: int = 4
    json_file: Path | None = None
    directory: Path | None = None
