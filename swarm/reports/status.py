"""The swarm as its records show it: who holds what, how far the run is, who trains. Shown by `swarm status`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from blocks.spans import Span
from peers.network import PeerId
from peers.published.catalogue import Catalogue, Published
from peers.records import Keeping, PeerRecord, ProgressRecord, TrainerRecord
from swarm.adapters.spreading import spread_of
from swarm.reports.traffic import MAX_ASKED, Traffic, ask_traffic, size_words, traffic_plain, traffic_rows

if TYPE_CHECKING:
    from swarm.node import Node

NOTHING_PUBLISHED = Catalogue(run="")


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """One look at a run. `missing` are blocks that nobody holds; `paused` are peers that have some but serve nobody
    now; `members` average what they train and serve nobody else; `traffic` is of the hosts that answered; `catalogue`
    lists the published adapters.
    """

    run: str
    name: str
    num_blocks: int
    hosts: tuple[PeerRecord, ...]
    progress: Mapping[str, ProgressRecord]
    trainers: tuple[TrainerRecord, ...]
    paused: tuple[PeerRecord, ...] = ()
    members: tuple[PeerRecord, ...] = ()
    traffic: Traffic = field(default_factory=dict)
    catalogue: Catalogue = NOTHING_PUBLISHED

    @property
    def round(self) -> int:
        """The newest completed round that any host announces."""
        return max((host.round for host in self.hosts), default=0)

    @property
    def missing(self) -> tuple[int, ...]:
        """Blocks without a holder."""
        held = {block for host in self.hosts for block in host.span.blocks()}
        return tuple(block for block in range(self.num_blocks) if block not in held)

    @property
    def tokens_per_second(self) -> float:
        """What all trainers together train now."""
        return sum(trainer.tokens_per_second for trainer in self.trainers)

    def to_plain(self) -> dict[str, object]:
        """For JSON."""
        return {
            "run": self.run,
            "name": self.name,
            "blocks": self.num_blocks,
            "missing_blocks": list(self.missing),
            "round": self.round,
            "tokens_per_second": round(self.tokens_per_second, 1),
            "hosts": [self._host(host) for host in self.hosts],
            "paused": [self._host(host) | {"paused_by": host.away} for host in self.paused],
            "members": [_given(member) for member in self.members],
            "trainers": [_trainer(trainer) for trainer in self.trainers],
            "traffic": traffic_plain(self.traffic),
            "adapters": [self._adapter(each) for each in self.catalogue.adapters],
        }

    def rows(self) -> list[tuple[str, ...]]:
        """For a table with `COLUMNS`: hosts by their first block, then trainers."""
        rows: list[tuple[str, ...]] = []
        for host in sorted(self.hosts, key=lambda record: (record.span.start, record.peer)):
            progress = self.progress.get(host.peer)
            rows.append(
                (
                    host.nickname or host.peer[-8:],
                    f"{host.span}  {_bar(host.span, self.num_blocks)}",
                    str(host.round),
                    "" if progress is None else str(progress.samples),
                    f"{host.tokens_per_second:.0f}",
                    host.dtype,
                )
            )
        for host in sorted(self.paused, key=lambda record: (record.span.start, record.peer)):
            rows.append(
                (
                    host.nickname or host.peer[-8:],
                    f"{host.span}  paused by {_PAUSED_BY[host.away]}",
                    str(host.round),
                    "",
                    "",
                    host.dtype,
                )
            )
        for trainer in self.trainers:
            held_out = "" if trainer.eval_loss is None else f", held out {trainer.eval_loss:.3f}"
            rows.append(
                (
                    trainer.nickname or trainer.peer[-8:],
                    f"trains: loss {trainer.loss:.3f}{held_out}",
                    str(trainer.round),
                    f"step {trainer.step}",
                    f"{trainer.tokens_per_second:.0f}",
                    "",
                )
            )
        return rows

    def given_rows(self) -> list[tuple[str, ...]]:
        """For a table with `GIVEN_COLUMNS`: the peers that say that they have given anything, most trained first."""
        peers = (*self.hosts, *self.paused, *self.members)
        return [
            (peer.nickname or peer.peer[-8:], f"{peer.trained_tokens:,}", f"{peer.served_tokens:,}")
            for peer in sorted(peers, key=lambda peer: (-peer.trained_tokens, -peer.served_tokens, peer.peer))
            if peer.trained_tokens or peer.served_tokens
        ]

    def adapter_rows(self) -> list[tuple[str, ...]]:
        """For a table with `ADAPTER_COLUMNS`: the published adapters, by name."""
        rows: list[tuple[str, ...]] = []
        for adapter in self.catalogue.adapters:
            spread = spread_of(self.hosts, adapter, self.num_blocks)
            hosts = f"{len(spread.having)} of {len(self.hosts)}"
            rows.append((adapter.name, hosts, str(spread.fewest), size_words(adapter.num_bytes)))
        return rows

    def traffic_rows(self) -> list[tuple[str, ...]]:
        """For a table with `TRAFFIC_COLUMNS`."""
        return traffic_rows(self.traffic, {PeerId(host.peer): host.nickname for host in self.hosts if host.nickname})

    def _adapter(self, adapter: Published) -> dict[str, object]:
        spread = spread_of(self.hosts, adapter, self.num_blocks)
        return {
            "name": adapter.name,
            "content": adapter.content.hex(),
            "bytes": adapter.num_bytes,
            "hosts": len(spread.having),
            "hosts_per_block": spread.fewest,
        }

    def _host(self, host: PeerRecord) -> dict[str, object]:
        progress = self.progress.get(host.peer)
        return {
            **_given(host),
            "blocks": [host.span.start, host.span.end],
            "round": host.round,
            "samples_since_round": None if progress is None else progress.samples,
            "total_samples": None if progress is None else progress.total_samples,
            "tokens_per_second": round(host.tokens_per_second, 1),
            "keeps": [] if progress is None else [_keeping(each) for each in progress.keeps],
            "cache_free_bytes": host.cache_free_bytes,
            "dtype": host.dtype,
            "software": host.software,
        }


_PAUSED_BY = {"hand": "hand", "hours": "its --hours"}
COLUMNS = ("peer", "blocks", "round", "samples", "tokens/s", "dtype")
ADAPTER_COLUMNS = ("published adapter", "hosts", "hosts per block, at least", "size")
GIVEN_COLUMNS = ("peer", "tokens trained", "tokens served")


def _keeping(keeping: Keeping) -> dict[str, object]:
    return {"blocks": [keeping.span.start, keeping.span.end], "round": keeping.round}


def _given(peer: PeerRecord) -> dict[str, object]:
    """Whose it is, and what it says it has given."""
    return {
        "peer": peer.peer,
        "nickname": peer.nickname,
        "trained_tokens": peer.trained_tokens,
        "served_tokens": peer.served_tokens,
    }


def title(status: Status) -> str:
    """One line above the table."""
    gaps = f", nobody holds {_ranges(status.missing)}" if status.missing else ""
    paused = f", {len(status.paused)} paused" if status.paused else ""
    return (
        f"{status.name}: round {status.round}, {len(status.hosts)} hosts{paused}, {len(status.trainers)} trainers, "
        f"{status.tokens_per_second:.0f} tokens/s trained{gaps}"
    )


async def look(node: Node) -> Status:
    """Read the directory once, and ask the hosts that it names."""
    await node.router.refresh()
    run = node.config.run
    progress = await node.directory.find_progress(run, node.whole)
    serving = {record.peer for record in node.router.records}
    hosts = sorted(node.router.records, key=lambda record: (record.span.start, record.peer))
    return Status(
        run=run,
        name=node.spec.name,
        num_blocks=node.spec.model.num_blocks,
        hosts=node.router.records,
        progress={record.peer: record for record in progress},
        trainers=tuple(await node.directory.find_trainers(run)),
        paused=tuple(record for record in node.router.found if record.away in _PAUSED_BY),
        members=tuple(each for each in node.router.found if each.roles and not each.away and each.peer not in serving),
        catalogue=await node.catalogue.look(),
        traffic=await ask_traffic(node.pool, [PeerId(host.peer) for host in hosts]),
    )


async def unserved(node: Node) -> tuple[int, ...]:
    """Blocks of whose holders none answers. Asks as many hosts as `look` does; of others, what earlier calls showed."""
    router = node.router
    await router.check([record.peer for record in router.records][:MAX_ASKED])
    held = {b for record in router.records if router.health.is_usable(record.peer) for b in record.span.blocks()}
    return tuple(block for block in node.whole.blocks() if block not in held)


def _trainer(trainer: TrainerRecord) -> dict[str, object]:
    return {
        "peer": trainer.peer,
        "nickname": trainer.nickname,
        "step": trainer.step,
        "loss": trainer.loss,
        "eval_loss": trainer.eval_loss,
        "tokens_per_second": round(trainer.tokens_per_second, 1),
    }


def _bar(span: Span, num_blocks: int, width: int = 30) -> str:
    """Where a span lies in the model."""
    cells = [index * num_blocks // width for index in range(width)] if num_blocks > width else list(range(num_blocks))
    return "".join("█" if block in span else "·" for block in cells)


def _ranges(blocks: Sequence[int]) -> str:
    found: list[list[int]] = []
    for block in blocks:
        if found and found[-1][1] == block:
            found[-1][1] = block + 1
        else:
            found.append([block, block + 1])
    return ", ".join(f"{start}:{end}" for start, end in found)
