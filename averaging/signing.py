"""Contributions as bytes: compact, signed by the peer's own key, bound to one run and one round number.

The signature keeps a leader, who passes everyone's bytes on, from changing a weight or leaving a peer's old words in a
new round. Layout: msgpack [body, public key, signature]; body: msgpack [version, run, number, layout, Mbit/s, client
mode, [[adapter, [[first block, count, weight], ...]], ...]].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import msgpack

from averaging.errors import BadContribution
from averaging.exchange import Contribution
from blocks.errors import BadSpan
from blocks.spans import MAX_BLOCKS, UnitId, parse_unit, unit_of
from peers.network import PeerId

MAX_BYTES = 4096
MAX_NUMBER = 2**31
_MAX_UNITS = 2 * MAX_BLOCKS
_VERSION = 1
_CONTEXT = b"swarmtune contribution 1\0"  # a signature over this can never pass for one over a record

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
            _ranges(contribution.weights),
        ]
    )
    data: bytes = msgpack.packb([body, signer.public_key, signer.sign(_CONTEXT + body)])
    if len(data) > MAX_BYTES:
        raise BadContribution(
            f"round {contribution.number}: the weights of {len(contribution.weights)} units take {len(data)} bytes "
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
    _, named_run, number, layout, megabits, client_mode, ranges = _expect(fields, int, str, int, str, float, bool, list)
    if named_run != run:
        raise BadContribution("made for another run")
    if not 0 <= number <= MAX_NUMBER:
        raise BadContribution(f"round number {number} is out of range")
    if len(layout) > 64:
        raise BadContribution("layout digest is too long")
    return Contribution(
        peer=peer,
        number=number,
        layout=layout,
        weights=dict(_units(ranges)),
        megabits_per_second=megabits,
        client_mode=client_mode,
    )


def _ranges(weights: Mapping[UnitId, float]) -> list[list[object]]:
    """Consecutive blocks of one adapter with one weight become a range, which is what a span usually is."""
    by_adapter: dict[str, list[list[float]]] = {}
    for adapter, block, weight in sorted((*parse_unit(unit), float(weight)) for unit, weight in weights.items()):
        ranges = by_adapter.setdefault(adapter, [])
        if ranges and ranges[-1][0] + ranges[-1][1] == block and ranges[-1][2] == weight:
            ranges[-1][1] += 1
        else:
            ranges.append([block, 1, weight])
    return [[adapter, ranges] for adapter, ranges in by_adapter.items()]


def _units(adapters: list[object]) -> Iterator[tuple[UnitId, float]]:
    seen: set[UnitId] = set()
    for entry in adapters:
        adapter, ranges = _expect(entry, str, list)
        for span in ranges:
            first, count, weight = _expect(span, int, int, float)
            if not (0 <= first < MAX_BLOCKS and 0 < count <= MAX_BLOCKS - first):
                raise BadContribution(f"blocks {first} and {count} more are out of range")
            if len(seen) + count > _MAX_UNITS:
                raise BadContribution(f"more than {_MAX_UNITS} units")
            for block in range(first, first + count):
                try:
                    unit = unit_of(adapter, block)
                except BadSpan as error:
                    raise BadContribution(str(error)) from error
                if unit in seen:
                    raise BadContribution(f"{unit} is named twice")
                seen.add(unit)
                yield unit, weight


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
