"""The owner's list of published adapters: grows, is signed, and cannot name what must not be served."""

from __future__ import annotations

from dataclasses import replace

import msgpack
import pytest

from peers.errors import BadRecord
from peers.owner_list import MAX_LIST_BYTES
from peers.published.catalogue import (
    MAX_ADAPTER_BYTES,
    Catalogue,
    Published,
    is_name,
    newest,
    open_catalogue,
    sign_catalogue,
)
from peers.records import MAX_PUBLISHED
from tests.errors_page import met
from tests.private_runs import Owner

OWNER = Owner(run="tales")
EMPTY = Catalogue(run="tales")
PIRATE = Published(name="pirate", content=b"p" * 32, num_bytes=1000)
LAWYER = Published(name="lawyer-1.5", content=b"l" * 32, num_bytes=1000)


def opened(catalogue: Catalogue, *, owner: Owner = OWNER, run: str = "tales") -> Catalogue:
    return open_catalogue(sign_catalogue(catalogue, owner.key), owner=OWNER.public, run=run)


def full() -> Catalogue:
    """As many adapters with as long names as there can be."""
    catalogue = EMPTY
    for number in range(MAX_PUBLISHED):
        name = f"{number:02}{'x' * 46}"
        catalogue = catalogue.with_adapter(Published(name=name, content=bytes([number]) * 32, num_bytes=2**39))
    return catalogue


def test_a_signed_list_comes_back() -> None:
    catalogue = EMPTY.with_adapter(PIRATE).with_adapter(LAWYER)
    found = opened(catalogue)
    assert found == catalogue
    assert (found.number, [each.name for each in found.adapters]) == (2, ["lawyer-1.5", "pirate"])
    assert open_catalogue(found.blob, owner=OWNER.public, run="tales") == found
    assert found.named("pirate") == PIRATE
    assert found.named("cook") is None


def test_a_full_list_is_a_dht_value_and_takes_no_more() -> None:
    catalogue = full()
    assert len(opened(catalogue).blob) <= MAX_LIST_BYTES
    with pytest.raises(BadRecord) as refused:
        catalogue.with_adapter(PIRATE)
    met("adapters are published, more are not served", refused.value)
    again = replace(catalogue.adapters[0], content=b"z" * 32)
    assert catalogue.with_adapter(again).named(again.name) == again, "one of the same name takes its place"


def test_the_number_grows_with_each_change_and_the_newest_list_wins() -> None:
    first = EMPTY.with_adapter(PIRATE)
    withdrawn = first.without("pirate")
    assert (first.number, withdrawn.number, withdrawn.adapters) == (1, 2, ())
    assert newest([withdrawn, EMPTY, first]) == withdrawn, "an older one that somebody repeats is not listened to"


def test_another_owners_list_and_another_runs_are_refused() -> None:
    for owner, run, words in (
        (Owner(run="tales"), "tales", "not signed by the run's owner"),
        (OWNER, "news", "of another run"),
    ):
        with pytest.raises(BadRecord, match=words):
            opened(EMPTY.with_adapter(PIRATE), owner=owner, run=run)


@pytest.mark.parametrize(
    "name", ["default", "Pirate", "-pirate", ".pirate", "", "a b", "a/b", "ä", "x" * 49, "pirate\n", "\x1b[31m"]
)
def test_a_name_that_is_not_allowed_is_refused_even_where_its_owner_signed_it(name: str) -> None:
    assert not is_name(name)
    with pytest.raises(BadRecord, match="cannot be right"):
        opened(replace(EMPTY, adapters=(replace(PIRATE, name=name),)))


@pytest.mark.parametrize(
    ("adapters", "words"),
    [
        ((PIRATE, replace(LAWYER, name="pirate")), "cannot be right"),
        ((replace(PIRATE, content=b"p" * 31),), "cannot be right"),
        ((replace(PIRATE, num_bytes=-1),), "cannot be right"),
        ((replace(PIRATE, num_bytes=MAX_ADAPTER_BYTES),), "cannot be right"),
        ((replace(PIRATE, num_bytes=True),), "cannot be right"),
        (tuple(replace(PIRATE, name=f"n{number}") for number in range(MAX_PUBLISHED + 1)), "at most 16 are served"),
    ],
)
def test_an_entry_that_cannot_be_right_is_refused(adapters: tuple[Published, ...], words: str) -> None:
    with pytest.raises(BadRecord, match=words):
        opened(replace(EMPTY, adapters=adapters))


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\xc1",
        msgpack.packb([1, b"body"]),
        msgpack.packb([2, b"body", b"s" * 64]),
        msgpack.packb([True, b"body", b"s" * 64]),
        b"\x93" * 5000,
    ],
)
def test_what_is_no_list_is_refused(blob: bytes) -> None:
    with pytest.raises(BadRecord):
        open_catalogue(blob, owner=OWNER.public, run="tales")


def test_a_signed_body_that_is_no_list_is_refused() -> None:
    for body in ([], ["tales", -1, []], ["tales", 2**40, []], ["tales", True, []], ["tales", 1, [["pirate"]]]):
        packed = bytes(msgpack.packb(body))
        blob = bytes(msgpack.packb([1, packed, OWNER.key.sign(b"swarmtune published 1\0" + packed)]))
        with pytest.raises(BadRecord):
            open_catalogue(blob, owner=OWNER.public, run="tales")
