"""Where a trainer stood when its last batch was committed, in a small file that is replaced whole."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from swarm.data.stream import DataPosition, parse_position
from swarm.errors import BadCheckpoint
from swarm.whole_file import replace_file

LIFE_BITS = 32
_MAX_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerState:
    """`life` and `step` name the microbatches of the batch that comes next (blocks.training.ledger.MicrobatchId)."""

    life: int = 0
    step: int = 0
    samples: int = 0
    position: DataPosition | None = None


def load_state(path: Path) -> TrainerState:
    """What was saved, or the beginning.

    Raises:
        BadCheckpoint: the file is malformed.
    """
    try:
        with path.open("rb") as file:
            saved = json.loads(file.read(_MAX_BYTES))
    except FileNotFoundError:
        return TrainerState()
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{path} cannot be read ({error}); remove it to begin the data anew") from None
    match saved:
        case {"life": int(life), "step": int(step), "samples": int(samples), "position": position} if (
            0 <= life < 1 << LIFE_BITS and step >= 0 and samples >= 0
        ):
            return TrainerState(life=life, step=step, samples=samples, position=parse_position(position))
    raise BadCheckpoint(f"{path} is malformed; remove it to begin the data anew")


def save_state(path: Path, state: TrainerState) -> None:
    """Replace the saved state at once.

    Raises:
        BadCheckpoint: the disk is full or read-only.
    """
    position = (state.position or DataPosition()).to_plain()
    plain = {"life": state.life, "step": state.step, "samples": state.samples, "position": position}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(plain).encode())
    except OSError as error:
        raise BadCheckpoint(f"{path} was not written ({error.strerror}); free space or check its permissions") from None
