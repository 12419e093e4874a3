"""How far a published adapter has come among the hosts. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peers.network import PeerId
from peers.published.catalogue import Published
from peers.records import PeerRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Which live hosts serve an adapter, `having`, and which do not yet, `lacking`; `fewest` is by how many hosts the
    block is served that the fewest serve.
    """

    having: tuple[PeerRecord, ...]
    lacking: tuple[PeerRecord, ...]
    fewest: int

    @property
    def is_whole(self) -> bool:
        """Whether every live host serves it, and every block has one."""
        return self.fewest > 0 and not self.lacking

    def words(self) -> str:
        """In one line."""
        done, everybody = len(self.having), len(self.having) + len(self.lacking)
        served = "" if self.fewest else ", and some blocks have no host that does"
        late = ", ".join(f"{host.nickname or host.peer[-8:]} ({host.span})" for host in self.lacking[:4])
        return f"{done} of {everybody} hosts serve it{served}{f'; not yet: {late}' if late else ''}"


def spread_of(
    records: Sequence[PeerRecord],
    adapter: Published,
    num_blocks: int,
    is_usable: Callable[[PeerId], bool] = lambda _: True,
) -> Spread:
    """Of the hosts that these records are of, as far as they are usable."""
    live = [record for record in records if "host" in record.roles and is_usable(record.peer)]
    having = tuple(record for record in live if adapter.mark in record.adapters)
    counts = [sum(block in record.span for record in having) for block in range(num_blocks)]
    lacking = tuple(record for record in live if adapter.mark not in record.adapters)
    return Spread(having=having, lacking=lacking, fewest=min(counts, default=0))
