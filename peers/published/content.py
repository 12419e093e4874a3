"""What a published adapter consists of: the digest of its unit in each block, and one digest over these. Pure.

Units travel one by one, so each must be checked by itself: whoever has the list of digests, which the digest on the
owner's list names, believes a unit from anybody. Units are named by that digest, as `CONTENT/block.N`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from blocks.spans import UnitId, parse_unit, unit_of
from blocks.unit_state import UnitState
from peers.errors import BadRecord
from peers.published.catalogue import CONTENT_BYTES
from peers.streams.messages import MAX_CONTENT_BYTES

_DOMAIN = b"swarmtune content 1\0"
_UNIT_BYTES = 32  # a sha256


def content_of(digests: Mapping[int, bytes]) -> tuple[bytes, bytes]:
    """The digest of an adapter whose units have these digests by block, and the list that it is the digest of.

    Raises:
        BadRecord: there are more blocks than a list may have.
    """
    listed = b"".join(digests[block] for block in sorted(digests))
    if len(listed) > MAX_CONTENT_BYTES:
        most = MAX_CONTENT_BYTES // _UNIT_BYTES
        raise BadRecord(f"an adapter of {len(digests)} blocks cannot be published; at most {most} blocks can have one")
    return _digest(listed), listed


def read_content(listed: bytes, content: bytes, blocks: Sequence[int]) -> dict[int, bytes]:
    """The digests of units by block; `blocks` are those in which the run's adapter has a unit.

    Raises:
        BadRecord: it is not the list that `content` is the digest of, or one for another model.
    """
    if _digest(listed) != content:
        raise BadRecord("a list of units has another digest than the adapter on the owner's list")
    if len(listed) != _UNIT_BYTES * len(blocks):
        raise BadRecord(f"a list of {len(listed)} bytes of digests is not of the run's {len(blocks)} units")
    return {block: listed[i * _UNIT_BYTES : (i + 1) * _UNIT_BYTES] for i, block in enumerate(sorted(blocks))}


def shared_unit(content: bytes, block: int) -> UnitId:
    """How the unit of a published adapter in a block is asked for."""
    return unit_of(content.hex(), block)


def content_named(unit: UnitId) -> tuple[bytes, int] | None:
    """The content and the block that a unit id names, if it is one of a published adapter."""
    name, block = parse_unit(unit)
    if len(name) != 2 * CONTENT_BYTES:
        return None
    try:
        return bytes.fromhex(name), block
    except ValueError:
        return None


def check_bare(state: UnitState) -> None:
    """Refuse what a finished adapter does not have.

    Raises:
        BadRecord: there is something to train on with.
    """
    if state.outer or state.moments or state.round or state.total_samples:
        raise BadRecord(f"{state.unit} is of an adapter that is trained, not of a finished one")


def _digest(listed: bytes) -> bytes:
    return hashlib.sha256(_DOMAIN + listed).digest()
