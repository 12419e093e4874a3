"""Contributions as bytes: compact, signed by the peer's own key, bound to one run and one round number.

The signature keeps a leader, who passes everyone's bytes on, from changing a weight or leaving a peer's old words in a
new round. Layout: msgpack [body, public key, signature]; body: msgpack [version, run, number, layout, Mbit/s, client
mode, [distrusted peer, ...], [[adapter, [[first block, count, samples, tokens, steps, round, samples behind that round,
8 bytes of digest per block], ...]], ...]].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import msgpack

from averaging.errors import BadContribution
from averaging.exchange import VERSION_DIGEST_BYTES, Brought, Contribution, Version
from blocks.errors import BadSpan
from blocks.spans import MAX_BLOCKS, UnitId, parse_unit, unit_of
from peers.network import PeerId

MAX_BYTES = 4096
MAX_NUMBER = 2**31
_MAX_UNITS = 2 * MAX_BLOCKS
_MAX_DISTRUSTED = 16
_VERSION = 2
_CONTEXT = b"swarmtune contribution 2\0"  # a signature over this can never pass for one over a record

Verify = Callable[[PeerId, bytes, bytes, bytes], bool]
"""Whether (peer, public key, data, signature) belong together; `peers.identity.verify`."""


class Signer(Protocol):
    """What signing needs of `peers.identity.Identity`."""

    @property
    def peer(self) -> PeerId:
        """Whose key it is."""

    @property
    def public_key(self) -> bytes:
        """What `Verify` takes at the other end."""

    def sign(self, data: bytes) -> bytes:
        """A signature over `data`."""


def pack(contribution: Contribution, run: str, signer: Signer) -> bytes:
    """A contribution as signed bytes.

    Raises:
        BadContribution: it would be longer than 4 kB: too many units with weights of their own.
    """
    body = msgpack.packb(
        [
            _VERSION,
            run,
            contribution.number,
            contribution.layout,
            float(contribution.megabits_per_second),
            contribution.client_mode,
            sorted(contribution.distrusts)[:_MAX_DISTRUSTED],
            _ranges(contribution.units),
        ]
    )
    data: bytes = msgpack.packb([body, signer.public_key, signer.sign(_CONTEXT + body)])
    if len(data) > MAX_BYTES:
        raise BadContribution(
            f"round {contribution.number}: the weights of {len(contribution.units)} units take {len(data)} bytes "
            f"of {MAX_BYTES}; hold fewer blocks or adapters"
        )
    return data


def parse(data: bytes, *, peer: PeerId, run: str, verify: Verify) -> Contribution:
    """Read a contribution that is said to come from `peer`.

    Weights may be any float: a strange one is refused with a reason later, in rounds.py, and not the whole peer here.

    Raises:
        BadContribution: too long, malformed, of another run or version, or not signed by `peer`.
    """
    try:
        return _parse(data, peer, run, verify)
    except BadContribution as error:
        raise BadContribution(f"contribution of {peer} is refused: {error}") from error


def _parse(data: bytes, peer: PeerId, run: str, verify: Verify) -> Contribution:
    if len(data) > MAX_BYTES:
        raise BadContribution(f"{len(data)} bytes; at most {MAX_BYTES}")
    body, public_key, signature = _expect(_unpack(data), bytes, bytes, bytes)
    if not verify(peer, public_key, _CONTEXT + body, signature):
        raise BadContribution("wrong signature")
    fields = _unpack(body)
    if not isinstance(fields, list) or not fields or fields[0] != _VERSION:
        raise BadContribution(f"not of version {_VERSION}; update the older peer")
    _, named_run, number, layout, megabits, client_mode, distrusts, ranges = _expect(
        fields, int, str, int, str, float, bool, list, list
    )
    if named_run != run:
        raise BadContribution("made for another run")
    if not 0 <= number <= MAX_NUMBER:
        raise BadContribution(f"round number {number} is out of range")
    if len(layout) > 64:
        raise BadContribution("layout digest is too long")
    if len(distrusts) > _MAX_DISTRUSTED or not all(isinstance(name, str) and len(name) <= 128 for name in distrusts):
        raise BadContribution("distrusted peers are malformed")
    return Contribution(
        peer=peer,
        number=number,
        layout=layout,
        units=dict(_units(ranges)),
        distrusts=frozenset(PeerId(name) for name in distrusts),
        megabits_per_second=megabits,
        client_mode=client_mode,
    )


def _ranges(units: Mapping[UnitId, Brought]) -> list[list[object]]:
    """Consecutive blocks of one adapter that were treated alike become a range, which is what a span usually is."""
    by_adapter: dict[str, list[_Range]] = {}
    for adapter, block, unit in sorted((*parse_unit(unit), unit) for unit in units):
        brought = units[unit]
        version = brought.version
        alike = (
            float(brought.samples), float(brought.tokens), brought.steps, version.number, float(version.weight)
        )  # fmt: skip
        ranges = by_adapter.setdefault(adapter, [])
        if not (ranges and ranges[-1].first + ranges[-1].count == block and ranges[-1].alike == alike):
            ranges.append(_Range(first=block, alike=alike))
        ranges[-1].count += 1
        ranges[-1].digests += version.digest[:VERSION_DIGEST_BYTES].ljust(VERSION_DIGEST_BYTES, b"\0")
    return [
        [adapter, [[entry.first, entry.count, *entry.alike, entry.digests] for entry in ranges]]
        for adapter, ranges in by_adapter.items()
    ]


@dataclass(slots=True)
class _Range:
    first: int
    alike: tuple[float, float, int, int, float]
    count: int = 0
    digests: bytes = b""


def _units(adapters: list[object]) -> Iterator[tuple[UnitId, Brought]]:
    seen: set[UnitId] = set()
    for entry in adapters:
        adapter, ranges = _expect(entry, str, list)
        for span in ranges:
            first, count, samples, tokens, steps, number, weight, digests = _expect(
                span, int, int, float, float, int, int, float, bytes
            )
            if not (0 <= first < MAX_BLOCKS and 0 < count <= MAX_BLOCKS - first):
                raise BadContribution(f"blocks {first} and {count} more are out of range")
            if len(seen) + count > _MAX_UNITS:
                raise BadContribution(f"more than {_MAX_UNITS} units")
            if len(digests) != VERSION_DIGEST_BYTES * count or not 0 <= number <= MAX_NUMBER or steps < 0:
                raise BadContribution(f"the states of blocks {first} and {count} more are malformed")
            if not math.isfinite(weight):
                raise BadContribution(f"the weight {weight} of a state is refused")
            for index, block in enumerate(range(first, first + count)):
                unit = _named(adapter, block)
                if unit in seen:
                    raise BadContribution(f"{unit} is named twice")
                seen.add(unit)
                digest = digests[index * VERSION_DIGEST_BYTES : (index + 1) * VERSION_DIGEST_BYTES]
                version = Version(number=number, weight=weight, digest=digest)
                yield unit, Brought(samples=samples, tokens=tokens, steps=steps, version=version)


def _named(adapter: str, block: int) -> UnitId:
    try:
        return unit_of(adapter, block)
    except BadSpan as error:
        raise BadContribution(str(error)) from error


def _unpack(data: bytes) -> object:
    try:
        value: object = msgpack.unpackb(data, strict_map_key=True, use_list=True, raw=False)
    except (ValueError, msgpack.exceptions.UnpackException, UnicodeDecodeError, RecursionError) as error:
        raise BadContribution("not valid msgpack") from error
    return value


def _expect(value: object, *kinds: type) -> list:  # type: ignore[type-arg]
    if not isinstance(value, list) or len(value) != len(kinds):
        raise BadContribution(f"expected a list of {len(kinds)} fields")
    for index, (field, kind) in enumerate(zip(value, kinds, strict=True)):
        if type(field) is not kind:  # exactly: a bool is no number here
            raise BadContribution(f"field {index} is {type(field).__name__}, not {kind.__name__}")
    return value
