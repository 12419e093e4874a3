"""swarm.toml: read it into a RunSpec, or write one with a comment beside every setting."""

from __future__ import annotations

import difflib
import os
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path

from swarm.config import AUTO_TARGETS, SECTIONS, RunSpec, Section
from swarm.errors import BadConfig

CONFIG_NAME = "swarm.toml"
_MAX_BYTES = 64 * 1024
_HEAD = """\
# The settings of one run, signed with owner.key and the same for every peer.
# Peers take them from the swarm; edit this file only before the run's first peer starts.
"""


def load_config(path: Path) -> RunSpec:
    """Read the run's settings; `path` is swarm.toml or the directory that holds it.

    Raises:
        BadConfig: missing, unreadable, not TOML, an unknown key, or a setting out of range.
    """
    file = path / CONFIG_NAME if path.is_dir() else path
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise BadConfig(f"{file} is larger than {_MAX_BYTES} bytes; that is not a swarm.toml")
        tables = tomllib.loads(file.read_text("utf-8-sig"))
    except FileNotFoundError:
        raise BadConfig(f"{file} does not exist; make a run with `swarm init NAME --model MODEL`") from None
    except OSError as error:
        raise BadConfig(f"{file} cannot be read ({error.strerror}); check its permissions") from None
    except UnicodeDecodeError:
        raise BadConfig(f"{file} is not UTF-8 text; save it as UTF-8") from None
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and as many brackets
        raise BadConfig(f"{file} is not TOML: {error}; mend that line") from None
    try:
        return spec_from_tables(tables)
    except BadConfig as error:
        raise BadConfig(f"{file}: {error}") from None


def spec_from_tables(tables: Mapping[str, object]) -> RunSpec:
    """Build the settings from nested plain values, wherever they come from.

    Raises:
        BadConfig: an unknown or missing key, or a setting out of range.
    """
    _refuse_unknown(tables, [item.name for item in fields(RunSpec)], where="")
    sections: dict[str, Section] = {}
    for section, kind in SECTIONS.items():
        table = tables.get(section, {})
        if not isinstance(table, Mapping):
            raise BadConfig(f"{section} is {table!r:.80}; write it as a section, [{section}]")
        _refuse_unknown(table, [item.name for item in fields(kind)], where=section)
        _refuse_missing(table, kind, where=section)
        sections[section] = kind(**table)
    top = {key: value for key, value in tables.items() if key not in SECTIONS}
    for key in ("name", "nonce"):
        if key not in top:
            raise BadConfig(f"{key} is missing; `swarm init` writes it")
    return RunSpec(**top, **sections)  # type: ignore[arg-type]  # checked in __post_init__


def tables_of(spec: RunSpec) -> dict[str, object]:
    """The settings as nested plain values, as in swarm.toml and the signed record; `spec_from_tables` reverses it."""
    tables: dict[str, object] = {"name": spec.name, "nonce": spec.nonce}
    for section in SECTIONS:
        settings = getattr(spec, section)
        tables[section] = {item.name: _plain(getattr(settings, item.name)) for item in fields(settings)}
    return tables


def config_text(spec: RunSpec) -> str:
    """`spec` as swarm.toml, with the unit and meaning of every setting beside it."""
    lines = [_HEAD]
    lines += [_line(item.name, getattr(spec, item.name), item.metadata["rule"].help) for item in fields(spec)[:2]]
    for section in SECTIONS:
        settings = getattr(spec, section)
        lines += ["", f"[{section}]"]
        for item in fields(settings):
            rule = item.metadata["rule"]
            words = f"{rule.help}: {', '.join(rule.choices)}" if rule.choices else rule.help
            lines.append(_line(item.name, getattr(settings, item.name), words))
    return "\n".join(lines) + "\n"


def write_config(spec: RunSpec, path: Path) -> None:
    """Write `spec` to the new file `path`, whole or not at all.

    Raises:
        BadConfig: `path` exists, or its directory cannot be written.
    """
    write_new_file(path, config_text(spec).encode(), mode=0o644)


def write_new_file(path: Path, content: bytes, *, mode: int) -> None:
    """Create `path` with `content`, whole or not at all, readable as `mode` says from its first byte on.

    Raises:
        BadConfig: it exists already, or cannot be written.
    """
    try:
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # 0600 from birth
    except OSError as error:
        raise BadConfig(f"{path.parent} cannot be written ({error.strerror}); choose another directory") from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(draft, mode)
        os.link(draft, path)  # unlike a rename it refuses to replace
    except FileExistsError:
        raise BadConfig(f"{path} exists already; choose another name, or remove it first") from None
    except OSError as error:
        raise BadConfig(f"{path} cannot be written ({error.strerror}); choose another directory") from None
    finally:
        os.unlink(draft)


def _refuse_unknown(table: Mapping[str, object], known: list[str], where: str) -> None:
    for key in table:
        if key in known:
            continue
        near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
        name = f"{where}.{key}" if where else str(key)
        raise BadConfig(f"{name:.120} is not a setting; the nearest one is {where + '.' if where else ''}{near[0]}")


def _refuse_missing(table: Mapping[str, object], kind: type[Section], where: str) -> None:
    for item in fields(kind):
        if item.default is MISSING and item.name not in table:
            raise BadConfig(f"{where}.{item.name} is missing ({item.metadata['rule'].help}); `swarm init` writes it")


def _plain(value: object) -> object:
    if value == AUTO_TARGETS:
        return "auto"
    return list(value) if isinstance(value, tuple) else value


def _line(name: str, value: object, words: str) -> str:
    return f"{name} = {_toml(_plain(value))}  # {words}"


def _toml(value: object) -> str:
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    if isinstance(value, list):
        return "[" + ", ".join(_toml(one) for one in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value)
