"""Which peers of this machine a command is about: those of a run, of a state directory, or all."""

from __future__ import annotations

from pathlib import Path

from swarm.cli.paths import state_root
from swarm.config_file import CONFIG_NAME
from swarm.errors import BadConfig
from swarm.join_string import RunDirectory, resolve_join, target_run_id
from swarm.state import OWN_STATE, is_state, states_of

TARGET_HELP = (
    "TARGET is a join string, a file that holds one, a run's directory, or the state directory of one peer; without "
    "it, all peers whose state is in the usual place are meant."
)


def find_states(target: str | None) -> list[Path]:
    """The state directories of the peers that TARGET means, whether they run or not.

    Raises:
        BadJoinString: it means none.
    """
    if target is None:
        return states_of(state_root())
    path = Path(target)
    if is_state(path) and not (path / CONFIG_NAME).exists():
        return [path]
    where = resolve_join(target)
    found = states_of(state_root(), target_run_id(where))
    own = [where.path / OWN_STATE] if isinstance(where, RunDirectory) else []
    return [state for state in own if is_state(state)] + found


def nobody_here(target: str | None) -> BadConfig:
    """What to say when no peer is meant."""
    if target is None:
        return BadConfig(
            f"no peer that holds blocks runs with its state under {state_root()}; name another by its run's directory "
            "or its --state"
        )
    return BadConfig(f"no peer that holds blocks runs here for {target:.80}; `swarm join` starts one")
