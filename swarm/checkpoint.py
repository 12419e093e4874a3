"""A host's units on disk: safetensors with a checksum, written whole by atomic rename, the last two kept.

Tensors are named `UNIT|TENSOR`, `UNIT|outer/…` and `UNIT|moments/TENSOR/…`; where each unit stands is in the file's
metadata.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from blocks.errors import BadSpan
from blocks.spans import UnitId, parse_unit
from blocks.unit_state import UnitState, joined, split
from swarm.errors import BadCheckpoint

logger = logging.getLogger(__name__)

KEEP = 2
_FORMAT = "swarmtune checkpoint 1"
_NAME = re.compile(r"round-(\d{10})\.safetensors")
_SEPARATOR = "|"
_CHECKSUM_BYTES = 32
_MAX_BYTES = 16 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """All units of one peer after one round of one run."""

    run: str
    layout: str
    round: int
    units: Mapping[UnitId, UnitState]


def save_checkpoint(directory: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint and remove all but the newest two.

    Raises:
        BadCheckpoint: the disk is full or read-only; what was there stays.
    """
    tensors: dict[str, torch.Tensor] = {}
    standing: dict[str, list[object]] = {}
    for unit, state in checkpoint.units.items():
        standing[unit] = [state.round, state.weight, state.total_samples, state.digest.hex()]
        for name, tensor in joined(state).items():
            tensors[f"{unit}{_SEPARATOR}{name}"] = _own(tensor)
    metadata = {
        "format": _FORMAT,
        "run": checkpoint.run,
        "layout": checkpoint.layout,
        "round": str(checkpoint.round),
        "units": json.dumps(standing),
    }
    data = save(tensors, metadata)
    path = directory / f"round-{checkpoint.round:010d}.safetensors"
    draft = directory / f".{path.name}.{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            file.write(data)
            file.write(hashlib.sha256(data).digest())
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise BadCheckpoint(
            f"checkpoint {path} was not written ({error.strerror}); free space or check its permissions"
        ) from None
    with suppress(OSError):  # what cannot be removed only takes space
        # Never the one just written, though torn ones of later rounds may stand before it.
        for old in [each for each in _files(directory) if each != path][KEEP - 1 :]:
            old.unlink(missing_ok=True)
        for left in directory.glob(".round-*.safetensors.*"):  # of a process that died while it wrote
            left.unlink(missing_ok=True)
    return path


def load_newest(directory: Path, *, run: str, layout: str) -> Checkpoint | None:
    """The newest checkpoint that is whole; None when there is none. A torn one is named in the log and passed over.

    Raises:
        BadCheckpoint: the newest whole one belongs to another run, or to other adapter settings.
    """
    for path in _files(directory):
        try:
            checkpoint = _read(path)
        except BadCheckpoint as error:
            logger.warning("checkpoint passed over: %s", error)
            continue
        if checkpoint.run != run:
            raise BadCheckpoint(f"{path} belongs to run {checkpoint.run}, not {run}; give this peer another --state")
        if checkpoint.layout != layout:
            raise BadCheckpoint(f"{path} was made with other adapter settings or another model; give another --state")
        return checkpoint
    return None


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with memory of its own, as safetensors refuses tensors that are views of one buffer."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _files(directory: Path) -> list[Path]:
    """Checkpoints, newest first."""
    found = [path for path in directory.glob("round-*.safetensors") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name, reverse=True)


def _read(path: Path) -> Checkpoint:
    try:
        data = _whole(path)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        tensors = load(data)
    except (OSError, SafetensorError, ValueError, AttributeError) as error:
        raise BadCheckpoint(f"{path} is torn or unreadable ({error})") from None
    return _parse(path, metadata, tensors)


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
            raise BadCheckpoint(f"{path} has format '{metadata['format'][:80]}'; this swarmtune reads '{_FORMAT}'")
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


def select(units: Mapping[UnitId, UnitState], held: Sequence[UnitId]) -> dict[UnitId, UnitState]:
    """Those of a checkpoint's units that are held now: a peer may come back with another span."""
    return {unit: units[unit] for unit in held if unit in units}
