"""Amounts as people write them."""

import pytest

from swarm.errors import BadConfig
from swarm.sizes import parse_bandwidth, parse_memory


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GB", 4 * 10**9),
        ("4 GB", 4 * 10**9),
        ("512MB", 512 * 10**6),
        ("1.5GiB", 3 << 29),
        ("800kB", 800_000),
        ("123456789B", 123_456_789),
        (" 2TB ", 2 * 10**12),
    ],
)
def test_memory_is_read_in_bytes(text: str, expected: int) -> None:
    assert parse_memory(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("20Mbit", 2.5e6),
        ("20Mbit/s", 2.5e6),
        ("2.5MB/s", 2.5e6),
        ("1Gbit", 125e6),
        ("64kbit", 8000.0),
        ("1MiB/s", float(1 << 20)),
    ],
)
def test_bandwidth_is_read_in_bytes_per_second(text: str, expected: float) -> None:
    assert parse_bandwidth(text) == expected


@pytest.mark.parametrize("text", ["4", "4gb", "4G", "-4GB", "GB", "4GB/s", "1e3GB", "4,5GB", "nan GB", "4 Gbit", ""])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(BadConfig, match=r"^--max-memory is '.*'; use a number and a unit, such as 4GB"):
        parse_memory(text)


@pytest.mark.parametrize("text", ["20", "20Mb", "20mbit", "2.5MB", "-20Mbit", "20Mbit/h", "inf Mbit", ""])
def test_what_is_no_bandwidth_is_refused(text: str) -> None:
    with pytest.raises(BadConfig, match=r"^--max-bandwidth is '.*'; use a number and a unit, such as 20Mbit"):
        parse_bandwidth(text)


def test_limits_of_nothing_or_far_too_much_are_refused() -> None:
    with pytest.raises(BadConfig, match="more than nothing"):
        parse_memory("0GB")
    with pytest.raises(BadConfig, match="more than any machine has"):
        parse_memory("999999999999999TB")
    for text in ("0Mbit", "63kbit", "0.0MB/s"):
        with pytest.raises(BadConfig, match="64kbit or more"):
            parse_bandwidth(text)
