"""What peers that are gone have left on this machine: the newest state of every unit in their state directories."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from blocks.spans import UnitId
from blocks.unit_state import UnitState
from swarm.config import RunSpec
from swarm.errors import BadCheckpoint, BadConfig
from swarm.join_string import Join, RunDirectory, known_of
from swarm.run import RUN_NAME, RunId, load_run, open_run
from swarm.units import checkpoint, kept
from swarm.units.files import Checkpoint, newest_of, read_whole

logger = logging.getLogger(__name__)

_MAX_CHILDREN = 1024


def left_settings(target: Join | RunDirectory, directories: Sequence[Path]) -> tuple[RunId, RunSpec]:
    """The run that `target` names, and its settings: from the target, or as a peer's directory has them signed.

    Raises:
        BadConfig: none of them has the settings.
        BadRecord: what a directory has is not what the run's owner signed.
    """
    known = known_of(target)
    if known.blob is not None:
        return known.run, open_run(known.blob, known.run)
    for directory in [each for given in directories for each in _state_directories(given)]:
        if (directory / RUN_NAME).is_file():
            run, blob = load_run(directory)
            if run == known.run:
                return run, open_run(blob, run)
    raise BadConfig(
        f"no directory given holds the settings of run {known.run} ({RUN_NAME}); name the run's own directory as JOIN"
    )


def find_left(directories: Sequence[Path], *, run: str, layout: str) -> Checkpoint:
    """The newest whole state of every unit in any of the directories: state directories, or what has such in it.

    Raises:
        BadCheckpoint: a directory has no whole state, or that of another run, or of other adapter settings.
    """
    found = []
    for given in directories:
        paths = [path for directory in _state_directories(given) for path in _unit_files(directory)]
        if not paths:
            raise BadCheckpoint(
                f"{given} holds no state of a peer; name a peer's --state directory, the one with "
                f"{checkpoint.DIRECTORY}/ in it"
            )
        whole = read_whole(paths, run=run, layout=layout, instead="leave it out")
        if not whole:
            raise BadCheckpoint(f"none of the {len(paths)} files of units in {given} is whole; name another directory")
        found += whole
    newest = newest_of(found)
    if newest is None:
        raise BadCheckpoint("no directory was named; name a peer's --state directory")
    return newest


def gather(state: Path, resume: Sequence[Path], store: kept.KeptStore, held: Collection[UnitId]) -> Checkpoint | None:
    """What a host starts from: the newest whole state of each unit that it holds, from its own checkpoints, its kept
    units and the directories of dead peers; None where there is nothing. Units there that it does not hold, it keeps.

    Raises:
        BadCheckpoint: a directory belongs to another run or other adapter settings, or one of `resume` has nothing.
    """
    own = checkpoint.load_newest(state / checkpoint.DIRECTORY, run=store.run, layout=store.layout)
    found = [] if own is None else [own]
    if resume:
        found.append(find_left(resume, run=store.run, layout=store.layout))
    for unit in store.units.keys() & set(held):
        kept_state = store.get(unit)
        if kept_state is not None:
            found.append(store.checkpoint_of(kept_state))
    newest = newest_of(found)
    if newest is None:
        return None
    _keep_others([unit_state for unit, unit_state in newest.units.items() if unit not in held], store)
    return replace(newest, units=checkpoint.select(newest.units, list(held)))


def _keep_others(states: Sequence[UnitState], store: kept.KeptStore) -> None:
    """A host that comes back with another span, or takes over from several, may have the only copy of some units: these
    are kept whatever the limit says, for they were on this machine before.
    """
    for state in states:
        if state.is_untrained or not store.is_newer(state.unit, state.version):
            continue
        try:
            store.put(state)
        except BadCheckpoint as error:
            logger.warning("a unit of another span is not kept: %s", error)


def _state_directories(given: Path) -> list[Path]:
    """`given` and what is right in it: a run's directory, or that of all peers on a machine, holds several."""
    try:
        children = sorted(path for path in given.iterdir() if path.is_dir())[:_MAX_CHILDREN]
    except OSError as error:
        raise BadCheckpoint(f"{given} cannot be read ({error.strerror}); name another directory") from None
    return [given, *children]


def _unit_files(directory: Path) -> list[Path]:
    return [
        *checkpoint.checkpoint_files(directory / checkpoint.DIRECTORY),
        *kept.kept_files(directory / kept.DIRECTORY),
    ]
