"""A run's first hosts on the machine of whoever made it, so that a group can chat before anybody else has come."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from blocks.spans import Span
from swarm.config_file import CONFIG_NAME, load_config
from swarm.errors import BadConfig
from swarm.join_string import Join, RunDirectory, is_state
from swarm.local import HostProcess, LocalHost, local_hosts

START_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalGroup:
    """Hosts that serve a run, and the run's directory as it is now that they do."""

    hosts: list[HostProcess]
    target: RunDirectory


@contextmanager
def local_group(target: Join | RunDirectory, count: int, cache_dir: Path) -> Iterator[LocalGroup]:
    """`count` host processes that hold the run's blocks in equal parts, until the context ends; their states stay in
    the run's directory.

    Raises:
        BadConfig: `target` is no directory made by `swarm init`, or its model has fewer blocks than `count`.
        SwarmError: a host did not get ready; the message has the end of its log.
    """
    if not isinstance(target, RunDirectory) or is_state(target.path):
        raise BadConfig("--local-hosts starts a run's own hosts; give the directory that `swarm init` made as JOIN")
    num_blocks = load_config(target.path / CONFIG_NAME).model.num_blocks
    if count > num_blocks:
        raise BadConfig(f"--local-hosts {count} is more than the model's {num_blocks} blocks; start fewer")
    spans = even_spans(count, num_blocks)
    states = [target.path / "hosts" / str(number) for number in range(count)]
    first = LocalHost(
        target=target.path,
        span=spans[0],
        state=states[0],
        cache_home=cache_dir.parent,
        threads=max(1, (os.cpu_count() or 1) // count),
    )
    others = list(zip(spans[1:], states[1:], strict=True))
    with local_hosts(first, others, seconds=START_SECONDS, by_directory=True) as hosts:
        yield LocalGroup(hosts=hosts, target=replace(target, join=hosts[0].join))


def even_spans(count: int, num_blocks: int) -> list[Span]:
    """All blocks, one after the other, in `count` parts that differ by one block at most."""
    return [Span(part * num_blocks // count, (part + 1) * num_blocks // count) for part in range(count)]
