"""Amounts of memory and bandwidth as a person writes them: `4GB`, `20Mbit`, `2.5MB/s`. Strict, since b is not B."""

from __future__ import annotations

import re
from collections.abc import Mapping

from swarm.errors import BadConfig

LEAST_SEND_BYTES_PER_SECOND = 8000  # 64 kbit/s: below it not even one peer's small messages fit
_MOST = 1e18
_AMOUNT = re.compile(r"(\d{1,15}(?:\.\d{1,6})?) ?([A-Za-z/]{1,8})", re.ASCII)
_BYTES: Mapping[str, int] = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
}
_RATES: Mapping[str, float] = (
    {f"{unit}/s": float(size) for unit, size in _BYTES.items()}
    | {f"{prefix}bit": size / 8 for prefix, size in (("k", 10**3), ("M", 10**6), ("G", 10**9))}
    | {f"{prefix}bit/s": size / 8 for prefix, size in (("k", 10**3), ("M", 10**6), ("G", 10**9))}
)


def parse_memory(text: str) -> int:
    """Read an amount of memory, such as `4GB` (decimal) or `4GiB` (binary), in bytes.

    Raises:
        BadConfig: it is malformed, or not positive.
    """
    return int(_parse(text, _BYTES, "--max-memory", "4GB, 512MB or 1.5GiB", least=1))


def parse_bandwidth(text: str) -> float:
    """Read a bandwidth, such as `20Mbit` or `2.5MB/s`, in bytes per second.

    Raises:
        BadConfig: it is malformed, or less than being in a swarm takes.
    """
    return _parse(text, _RATES, "--max-bandwidth", "20Mbit or 2.5MB/s", least=LEAST_SEND_BYTES_PER_SECOND)


def _parse(text: str, units: Mapping[str, float], option: str, examples: str, *, least: int) -> float:
    found = _AMOUNT.fullmatch(text.strip())
    if found is None or found[2] not in units:
        raise BadConfig(f"{option} is {text!r:.40}; use a number and a unit, such as {examples}")
    amount = float(found[1]) * units[found[2]]
    if amount < least:
        needed = "more than nothing" if least == 1 else f"{least * 8 // 1000}kbit or more"
        raise BadConfig(f"{option} is {text!r:.40}; give {needed}, such as {examples}")
    if amount > _MOST:
        raise BadConfig(f"{option} is {text!r:.40}, more than any machine has; leave it out for no limit")
    return amount
