"""Units on disk: safetensors with a checksum, written whole by atomic rename. Which files there are is for others.

Tensors are named `UNIT|TENSOR`, `UNIT|outer/…` and `UNIT|moments/TENSOR/…`; where each unit stands is in the file's
metadata.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from blocks.errors import BadSpan
from blocks.spans import UnitId, parse_unit
from blocks.unit_state import UnitState, joined, split
from swarm.errors import BadCheckpoint

logger = logging.getLogger(__name__)

_FORMAT = "swarmtune checkpoint 1"
_SEPARATOR = "|"
_CHECKSUM_BYTES = 32
_MAX_BYTES = 16 << 30


class _OtherFormat(BadCheckpoint):
    """Whole, and of another version of swarmtune: what it has is not lost, so nothing may be written over it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """Units of one run as of `round`. `layout` names the model and the adapter's shape (adapters.layout_digest)."""

    run: str
    layout: str
    round: int
    units: Mapping[UnitId, UnitState]


def write_units(path: Path, checkpoint: Checkpoint) -> None:
    """Write a file whole or not at all; one that was there is replaced.

    Raises:
        BadCheckpoint: the disk is full or read-only; what was there stays.
    """
    data = _packed(checkpoint)
    draft = path.parent / f".{path.name}.{secrets.token_hex(4)}"  # an abandoned thread may write the same file still
    try:
        _make_directory(path.parent)
        with draft.open("wb") as file:
            file.write(data)
            file.write(hashlib.sha256(data).digest())
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        _settle(path.parent)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise BadCheckpoint(
            f"checkpoint {path} was not written ({error.strerror}); free space or check its permissions"
        ) from None


def _make_directory(directory: Path) -> None:
    if not directory.is_dir():
        directory.mkdir(parents=True, exist_ok=True)
        _settle(directory.parent)


def _settle(directory: Path) -> None:
    """Wait until the names in a directory are on the disk: the file before this one goes once this returns."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems of networks cannot
            raise
    finally:
        os.close(handle)


def clear_drafts(directory: Path) -> None:
    """Remove what a process that died while it wrote has left, before anything is written here."""
    with suppress(OSError):  # what cannot be removed only takes space
        for left in directory.glob(".*.safetensors.*"):
            left.unlink(missing_ok=True)


def read_units(path: Path) -> Checkpoint:
    """What `write_units` wrote.

    Raises:
        BadCheckpoint: torn, unreadable or malformed.
    """
    try:
        data = _whole(path)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        tensors = load(data)
    except (OSError, SafetensorError, ValueError, AttributeError) as error:
        raise BadCheckpoint(f"{path} is torn or unreadable ({error})") from None
    return _parse(path, metadata, tensors)


def read_whole(paths: Iterable[Path], *, run: str, layout: str, instead: str) -> list[Checkpoint]:
    """Those of some files that are whole, in their order. A torn one is named in the log and passed over.

    Raises:
        BadCheckpoint: a whole one belongs to another run, to other adapter settings or to another version of this
            program; it says to do `instead`.
    """
    found = []
    for path in paths:
        try:
            checkpoint = read_units(path)
        except _OtherFormat as error:
            raise BadCheckpoint(f"{error}; update swarmtune, or {instead}") from None
        except BadCheckpoint as error:
            logger.warning("checkpoint passed over: %s", error)
            continue
        if checkpoint.run != run:
            raise BadCheckpoint(f"{path} belongs to run {checkpoint.run}, not {run}; {instead}")
        if checkpoint.layout != layout:
            raise BadCheckpoint(f"{path} was made with other adapter settings or another model; {instead}")
        found.append(checkpoint)
    return found


def newest_of(checkpoints: Iterable[Checkpoint]) -> Checkpoint | None:
    """The newest version of every unit in any of some checkpoints of one run, and their newest round; None of none."""
    best: Checkpoint | None = None
    for each in checkpoints:
        if best is None:
            best = each
            continue
        units = dict(best.units)
        for unit, state in each.units.items():
            if unit not in units or state.version > units[unit].version:
                units[unit] = state
        best = replace(best, round=max(best.round, each.round), units=units)
    return best


def _packed(checkpoint: Checkpoint) -> bytes:
    tensors: dict[str, torch.Tensor] = {}
    standing: dict[str, list[object]] = {}
    for unit, state in checkpoint.units.items():
        standing[unit] = [state.round, state.weight, state.total_samples, state.digest.hex()]
        for name, tensor in joined(state).items():
            # With memory of its own, as safetensors refuses tensors that are views of one buffer.
            tensors[f"{unit}{_SEPARATOR}{name}"] = tensor.detach().clone(memory_format=torch.contiguous_format)
    metadata = {
        "format": _FORMAT,
        "run": checkpoint.run,
        "layout": checkpoint.layout,
        "round": str(checkpoint.round),
        "units": json.dumps(standing),
    }
    return save(tensors, metadata)


def _whole(path: Path) -> bytes:
    """The safetensors bytes, without the checksum behind them: safetensors refuses a file with anything more."""
    size = path.stat().st_size
    if not _CHECKSUM_BYTES < size <= _MAX_BYTES:
        raise ValueError(f"it has {size} bytes")
    raw = path.read_bytes()
    data, checksum = raw[:-_CHECKSUM_BYTES], raw[-_CHECKSUM_BYTES:]
    if hashlib.sha256(data).digest() != checksum:
        raise ValueError("its checksum is wrong")
    return data


def _parse(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> Checkpoint:
    try:
        if metadata["format"] != _FORMAT:
            raise _OtherFormat(f"{path} has format '{metadata['format'][:80]}', and this swarmtune reads '{_FORMAT}'")
        standing = json.loads(metadata["units"])
        units = {}
        for name, (number, weight, total, digest) in standing.items():
            parse_unit(name)
            units[UnitId(name)] = _unit(
                UnitId(name), (int(number), float(weight), int(total), bytes.fromhex(digest)), tensors
            )
        return Checkpoint(run=metadata["run"], layout=metadata["layout"], round=int(metadata["round"]), units=units)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, BadSpan) as error:
        raise BadCheckpoint(f"{path} is malformed ({error})") from None


def _unit(unit: UnitId, standing: tuple[int, float, int, bytes], tensors: Mapping[str, torch.Tensor]) -> UnitState:
    prefix = f"{unit}{_SEPARATOR}"
    own, outer, moments = split(
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    )
    number, weight, total, digest = standing
    return UnitState(
        unit=unit,
        round=number,
        weight=weight,
        total_samples=total,
        digest=digest,
        tensors=own,
        outer=outer,
        moments=moments,
    )
