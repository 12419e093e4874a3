from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peers.address_book import MAX_ADDRESSES, load_addresses, save_addresses
from peers.errors import NetworkFailed


def address(number: int) -> str:
    return f"/ip4/10.0.0.1/tcp/{number}/p2p/Qm{number}"


def test_newest_addresses_come_first_and_old_ones_fall_out(tmp_path: Path) -> None:
    book = tmp_path / "state" / "peers.json"
    assert load_addresses(book) == ()
    save_addresses(book, [address(1), address(2)])
    save_addresses(book, [address(2), address(3)])
    assert load_addresses(book) == (address(2), address(3), address(1))
    save_addresses(book, [address(n) for n in range(100, 200)])
    assert load_addresses(book) == tuple(address(n) for n in range(100, 100 + MAX_ADDRESSES))
    assert [path.name for path in book.parent.iterdir()] == ["peers.json"]


def test_what_is_not_an_address_is_left_out(tmp_path: Path) -> None:
    book = tmp_path / "peers.json"
    book.write_text(json.dumps([address(1), "/ip4/10.0.0.1/tcp/1", 5, None, "x" * 300, "/ip4/1.1.1.1/tcp/1/p2p/Q\n"]))
    assert load_addresses(book) == (address(1),)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_a_damaged_book_is_an_empty_one(tmp_path: Path, data: bytes) -> None:
    book = tmp_path / "peers.json"
    book.write_bytes(data)
    assert load_addresses(book) == ()
    save_addresses(book, [address(1)])
    assert load_addresses(book) == (address(1),)


def test_a_book_that_cannot_be_written_is_an_error_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NetworkFailed, match=r"peers\.json cannot be written"):
        save_addresses(tmp_path / "file" / "peers.json", [address(1)])
