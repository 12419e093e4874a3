"""A new run on disk: its settings and its owner's key, both or neither."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from swarm.config import RunSpec, check_run_name
from swarm.config_file import CONFIG_NAME, spec_from_tables, write_config
from swarm.errors import BadConfig
from swarm.run import KEY_NAME, RunId, create_owner_key, new_nonce, public_bytes, run_id_of


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRun:
    """What `create_run` made."""

    directory: Path
    spec: RunSpec
    run_id: RunId


def check_free(directory: Path) -> None:
    """Refuse a place where no run can be made, before anything is done for one.

    Raises:
        BadConfig: its last part is no name of a run, or a run is there already.
    """
    check_run_name(directory.absolute().name)
    for name in (CONFIG_NAME, KEY_NAME):
        if (directory / name).exists():
            raise BadConfig(f"{directory / name} exists already; choose another NAME, or remove that run first")


def create_run(directory: Path, tables: Mapping[str, object]) -> NewRun:
    """Write swarm.toml and owner.key into `directory`, which is made if need be; its name is the run's.

    `tables` holds the settings by section, as in swarm.toml; [model] must be complete.

    Raises:
        BadConfig: a setting is wrong, a run is there already, or the directory cannot be written.
    """
    spec = spec_from_tables({**tables, "name": directory.absolute().name, "nonce": new_nonce()})
    check_free(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadConfig(f"{directory} cannot be made ({error.strerror}); choose another NAME") from None
    key = create_owner_key(directory / KEY_NAME)
    try:
        write_config(spec, directory / CONFIG_NAME)
    except BadConfig:
        (directory / KEY_NAME).unlink()
        raise
    return NewRun(directory=directory, spec=spec, run_id=run_id_of(public_bytes(key), spec))
