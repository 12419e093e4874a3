"""Bytes on the streams of hosts, by host and kind of question, as each host counts them. Shown by `swarm status`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence

from peers.errors import PeerLost, Refused
from peers.network import PeerId
from peers.streams.messages import AskInfo, InfoReply, StreamKind
from peers.streams.pool import Pool
from peers.streams.traffic import KindTraffic

logger = logging.getLogger(__name__)

TRAFFIC_COLUMNS = ("peer", "kind", "sent", "received")
MAX_ASKED = 64  # hosts of one look; in a larger swarm the table would be too long to read anyway
_ASK_SECONDS = 3.0
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")

Traffic = Mapping[PeerId, tuple[KindTraffic, ...]]


async def ask_traffic(pool: Pool, hosts: Sequence[PeerId], *, seconds: float = _ASK_SECONDS) -> Traffic:
    """What the first `MAX_ASKED` hosts have sent and received so far; those that do not answer in time are left out."""
    asked = hosts[:MAX_ASKED]
    found = await asyncio.gather(*(_ask(pool, host, seconds) for host in asked))
    return {host: counts for host, counts in zip(asked, found, strict=True) if counts is not None}


def traffic_rows(traffic: Traffic, names: Mapping[PeerId, str]) -> list[tuple[str, ...]]:
    """For a table with `TRAFFIC_COLUMNS`: each host's kinds, most bytes first, and its total."""
    rows: list[tuple[str, ...]] = []
    for host, counts in traffic.items():
        name = names.get(host, host[-8:])
        for count in sorted(counts, key=lambda each: (-each.sent - each.received, each.kind)):
            rows.append((name, count.kind, size_words(count.sent), size_words(count.received)))
        rows.append((name, "total", *(size_words(each) for each in _total(counts))))
    return rows


def traffic_plain(traffic: Traffic) -> dict[str, object]:
    """For JSON: by host and kind, in bytes, with the total beside each host's kinds."""
    return {
        host: {
            "kinds": {count.kind: {"sent": count.sent, "received": count.received} for count in counts},
            **dict(zip(("sent", "received"), _total(counts), strict=True)),
        }
        for host, counts in traffic.items()
    }


def size_words(num_bytes: int) -> str:
    """A number of bytes for a person, in decimal units with three digits: `1.25 MB`."""
    value, unit = float(num_bytes), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{num_bytes} B" if unit == 0 else f"{value:#.3g}".rstrip(".") + f" {_UNITS[unit]}"


async def _ask(pool: Pool, host: PeerId, seconds: float) -> tuple[KindTraffic, ...] | None:
    try:
        answer = await pool.call(host, StreamKind.INFO, AskInfo(traffic=True), seconds=seconds)
    except (PeerLost, Refused) as error:
        logger.info("no traffic counts from peer=%s reason=%s", host, error)
        return None
    return answer.message.traffic if isinstance(answer.message, InfoReply) else None


def _total(counts: Sequence[KindTraffic]) -> tuple[int, int]:
    return sum(count.sent for count in counts), sum(count.received for count in counts)
