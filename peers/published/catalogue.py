"""Which finished adapters a run's hosts serve beside the one that they train: the owner's signed list. Pure.

The list has a number that only grows, so that an older one cannot be offered again. An adapter is named by its content
(see content.py); the name for people is only on the list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from peers.errors import BadRecord
from peers.owner_list import malformed, open_list, seal_list
from peers.records import DIGEST_BYTES, MAX_PUBLISHED

MAX_ADAPTER_BYTES = 1 << 40
CONTENT_BYTES = 32

_WHAT = "adapters"
_DOMAIN = b"swarmtune published 1\0"
_MAX_NUMBER = 2**40
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,47}")
_RESERVED = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One adapter of the list: its name, the digest of its content, and what its tensors take in all, in bytes."""

    name: str
    content: bytes
    num_bytes: int

    @property
    def mark(self) -> bytes:
        """What records of hosts say of it: a few bytes of its digest."""
        return self.content[:DIGEST_BYTES]


@dataclass(frozen=True, kw_only=True, slots=True)
class Catalogue:
    """A run's list, by name. `blob` is the list as its owner signed it; empty for one that nobody has signed yet."""

    run: str
    number: int = 0
    adapters: tuple[Published, ...] = ()
    blob: bytes = field(default=b"", compare=False, repr=False)

    def named(self, name: str) -> Published | None:
        """The adapter of that name."""
        return next((each for each in self.adapters if each.name == name), None)

    def with_adapter(self, adapter: Published) -> Catalogue:
        """The next list, in which `adapter` takes the place of what had its name.

        Raises:
            BadRecord: the list is full.
        """
        others = [each for each in self.adapters if each.name != adapter.name]
        if len(others) >= MAX_PUBLISHED:
            raise BadRecord(
                f"{len(others)} adapters are published, more are not served; withdraw one first: "
                "swarm publish RUN --withdraw NAME"
            )
        return self._next([*others, adapter])

    def without(self, name: str) -> Catalogue:
        """The next list, which lacks the adapter `name`."""
        return self._next(each for each in self.adapters if each.name != name)

    def _next(self, adapters: Iterable[Published]) -> Catalogue:
        listed = tuple(sorted(adapters, key=lambda each: each.name))
        return replace(self, number=self.number + 1, adapters=listed, blob=b"")


def is_name(name: str) -> bool:
    """Whether an adapter can be published under `name` in any run."""
    return _NAME.fullmatch(name) is not None and name != _RESERVED


def sign_catalogue(catalogue: Catalogue, owner: Ed25519PrivateKey) -> bytes:
    """The list as the owner's word, for `open_catalogue`."""
    listed = [[each.name, each.content, each.num_bytes] for each in catalogue.adapters]
    return seal_list([catalogue.run, catalogue.number, listed], owner, _DOMAIN)


def open_catalogue(blob: bytes, *, owner: bytes, run: str) -> Catalogue:
    """The list in `blob`, from wherever it came; `owner` is the run's public key, 32 raw bytes.

    Raises:
        BadRecord: malformed, too large, of another run, or not signed by its owner.
    """
    match open_list(blob, owner, _DOMAIN, _WHAT):
        case [str(found), int(number), [*entries]] if found == run and _is_count(number, _MAX_NUMBER):
            return Catalogue(run=run, number=number, adapters=_adapters(entries), blob=blob)
    raise malformed(_WHAT)


def newest(lists: Iterable[Catalogue]) -> Catalogue:
    """The one with the greatest number; whoever offers an older one is not listened to."""
    return max(lists, key=lambda one: one.number)


def _adapters(entries: list[object]) -> tuple[Published, ...]:
    adapters: dict[str, Published] = {}
    for entry in entries:
        match entry:
            case [str(name), bytes(content), int(num_bytes)] if (
                is_name(name)
                and name not in adapters
                and len(content) == CONTENT_BYTES
                and _is_count(num_bytes, MAX_ADAPTER_BYTES)
            ):
                adapters[name] = Published(name=name, content=content, num_bytes=num_bytes)
                continue
        raise BadRecord("a list of adapters has an entry that cannot be right")
    if len(adapters) > MAX_PUBLISHED:
        raise BadRecord(f"a list has {len(adapters)} adapters; at most {MAX_PUBLISHED} are served")
    return tuple(adapters.values())


def _is_count(number: int, most: int) -> bool:
    return type(number) is int and 0 <= number < most
