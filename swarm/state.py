"""State directories: where one peer keeps its identity and checkpoints, locked while a process uses it."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from swarm.errors import BadConfig
from swarm.run import RunId

IDENTITY_NAME = "identity"  # the peer's libp2p key, see peers/identity.py
OWN_STATE = "peer"  # in a run's directory: the state of the host that was started from it
_LOCK_NAME = "lock"
_MAX_PEERS = 256  # of one run on one machine


@dataclass(frozen=True, slots=True)
class StateDirectory:
    """A directory that this process alone uses, until `close` or its end."""

    path: Path
    _handle: int

    def close(self) -> None:
        """Let another process have it."""
        os.close(self._handle)

    def __enter__(self) -> StateDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def state_path(root: Path, run_id: RunId, number: int = 0) -> Path:
    """Where the `number`th peer of a run on this machine keeps its state."""
    return root / run_id / f"peer-{number}"


def claim_state(root: Path, run_id: RunId) -> StateDirectory:
    """Make and lock the first free `root/RUN_ID/peer-K`: who comes back finds its own, a second peer gets another.

    Raises:
        BadConfig: the directory cannot be written, or 256 peers of this run live here already.
    """
    for number in range(_MAX_PEERS):
        state = _try_lock(state_path(root, run_id, number))
        if state is not None:
            return state
    raise BadConfig(f"{_MAX_PEERS} peers of this run have their state in {root / run_id}; give another --state")


def states_of(root: Path, run_id: RunId | None = None) -> list[Path]:
    """The state directories under `root` that there are, of one run or of all."""
    found = (root / run_id).glob("peer-*") if run_id is not None else root.glob("*/peer-*")
    return sorted(path for path in found if is_state(path))


def is_state(path: Path) -> bool:
    """Whether a peer has had its state here."""
    return (path / _LOCK_NAME).is_file()


def lock_state(path: Path) -> StateDirectory:
    """Make and lock exactly `path`, for a person who chose it with --state.

    Raises:
        BadConfig: it cannot be written, or another process uses it.
    """
    state = _try_lock(path)
    if state is None:
        raise BadConfig(f"state directory {path} is in use by another process; stop that one or give another --state")
    return state


def _try_lock(path: Path) -> StateDirectory | None:
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(path / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise BadConfig(f"state directory {path} cannot be used ({error.strerror}); give another --state") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return StateDirectory(path, handle)
