"""The few functions that a script starts with: make a run, enter it. All else is on the Peer that `join` returns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from blocks.checks import check_kind, shown
from blocks.spans import MAX_BLOCKS, parse_span
from peers.config import NetworkConfig
from swarm.arguments import as_path
from swarm.errors import BadConfig, BadJoinString
from swarm.join_string import Join, RunDirectory, resolve_join
from swarm.new_run import check_free, create_run
from swarm.peer import ENTERING, Peer
from swarm.peer_config import PeerConfig

CACHE = Path("~/.cache/swarmtune")
STATE = Path("~/.local/share/swarmtune")
Target: TypeAlias = str | Path | Join | RunDirectory
"""What names a run: its join string, its directory or a file that holds the join string, or what `init` returned."""


def init(
    directory: str | Path, base: str | Path, *, cache_dir: Path | None = None, **sections: Mapping[str, object]
) -> RunDirectory:
    """Make a run on the model `base`: `directory` gets swarm.toml and the owner's key. `sections` are swarm.toml's.

    Example: `swarm.init("tales", "HuggingFaceTB/SmolLM2-135M", training={"batch_size": 8}, adapter={"lora_rank": 16})`

    Raises:
        BadConfig: a setting is wrong, or a run is there already.
        UnknownModel, UnsupportedModel: the model cannot be found or cut into spans.
        BadAdapter: the model has no module of a name in `lora_targets`.
    """
    from swarm.run_model import model_settings  # imported here: it needs transformers, which a script may not

    place, given = as_path("directory", directory), dict(sections)
    check_free(place)
    check_kind(BadConfig, "base", base, (str, Path), "the directory or the hub id of a model")
    check_kind(BadConfig, "model", given.get("model", {}), Mapping, "a section of settings, as model={...}")
    chosen = dict(given.pop("model", {}))
    revision = str(chosen.get("revision") or "") or None
    adapter = given.get("adapter")
    targets = adapter.get("lora_targets") if isinstance(adapter, Mapping) else None
    cache = as_path("cache_dir", cache_dir or CACHE)
    found = model_settings(str(base), revision=revision, cache_dir=cache, targets=targets)
    made = create_run(place, {**given, "model": {**chosen, **found}})
    return RunDirectory(path=made.directory, join=None)


def join(
    target: Target,
    *,
    blocks: str | None = None,
    host: str = "0.0.0.0",
    config: PeerConfig | None = None,
    threads: int | None = None,
    behind_nat: bool = False,
) -> Peer:
    """Enter a run by its join string, its directory, or another peer's `.join`.

    `blocks` is "auto" (what the swarm lacks most), "A:B", or None to hold nothing, as trainers and clients do. `host`
    is the address to listen on: 127.0.0.1 for a swarm of this machine alone. A peer `behind_nat` listens nowhere, and
    holds "A:B" for itself. `config` replaces `host`, `threads` and `behind_nat`.

    Raises:
        SwarmError, PeerError, BlockError: one line that says what is wrong and what to do.
    """
    if config is not None:
        check_kind(BadConfig, "config", config, PeerConfig, "swarm.PeerConfig(...), or leave it out")
    chosen = None if blocks is None or blocks == "auto" else parse_span(str(blocks), MAX_BLOCKS)
    config = config or PeerConfig(
        state_root=STATE.expanduser(),
        cache_dir=CACHE.expanduser(),
        network=NetworkConfig(host=host, client_mode=behind_nat or blocks is None),
        num_threads=threads,
    )
    peer = enter(target, config)
    if blocks is not None:
        from swarm.hosts.loading import HostingConfig

        try:
            hosting = HostingConfig(cache_dir=config.cache_dir, num_threads=config.num_threads, model=config.model)
            peer.hold(chosen, hosting)
        except BaseException:
            peer.close()
            raise
    return peer


def enter(target: Target, config: PeerConfig) -> Peer:
    """As Peer.enter, for all that names a run. Raises as it does.

    A directory is read again: since it was made, its first peer may have written where it is.
    """
    with ENTERING:  # so that of two threads the second finds the first
        return Peer.enter(resolve(target), config)


def resolve(target: Target) -> Join | RunDirectory:
    """The run that is named, as far as that can be said without a network; a directory is read.

    Raises:
        BadJoinString: it names none.
    """
    given = target.path if isinstance(target, RunDirectory) else target
    if isinstance(given, Join):
        return given
    if not isinstance(given, (str, Path)):
        raise BadJoinString(
            f"{shown(given)} names no run; use a join string, a run's directory, or another peer's .join"
        )
    return resolve_join(str(given))
