"""The names that are served now: those of runs and base models, which stay, and those of published adapters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from swarm.gateway.catalog import Served

if TYPE_CHECKING:
    from peers.published.catalogue import Published
    from swarm.peer import Peer


class LiveCatalog(Mapping[str, Served]):
    """`stays` by name, and what `published` says of each run when it is asked, last.

    An adapter whose name is not the only one of its kind is named `RUN/NAME`, by its run's name among those that stay.
    """

    def __init__(
        self, stays: Mapping[str, Served], published: Callable[[], Mapping[Peer, tuple[Published, ...]]]
    ) -> None:
        self._stays, self._published = dict(stays), published
        self._runs = {served.through[0].peer: served for served in stays.values() if served.adapter is True}
        self._made: dict[tuple[str, bytes], Served] = {}  # so that each has been there since it came

    def __getitem__(self, name: str) -> Served:
        return self._now()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._now())

    def __len__(self) -> int:
        return len(self._now())

    def _now(self) -> dict[str, Served]:
        listed = [(self._runs[peer], each) for peer, adapters in self._published().items() for each in adapters]
        times = Counter([*self._stays, *(adapter.name for _, adapter in listed)])
        made: dict[tuple[str, bytes], Served] = {}
        now = dict(self._stays)
        for run, adapter in listed:
            name = adapter.name if times[adapter.name] == 1 else f"{run.name}/{adapter.name}"
            if name in now:  # a base model of that name
                continue
            known = self._made.get((name, adapter.content))
            now[name] = made[name, adapter.content] = known or _served(run, name, adapter)
        self._made = made
        return now


def _served(run: Served, name: str, adapter: Published) -> Served:
    return Served(name=name, words=run.words, through=run.through, adapter=adapter, is_live=run.is_live)
