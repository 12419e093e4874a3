"""The run's model on this machine: found, and checked to be the same one that the run's owner meant."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from blocks.adapters import LoraSettings, all_unit_shapes
from blocks.source import ModelSource, find_model
from blocks.weights_mark import weights_marks, wrong_parts
from swarm.config import AUTO_TARGETS, RunSpec
from swarm.errors import BadConfig


def model_settings(name: str, *, revision: str | None, cache_dir: Path, targets: object = None) -> dict[str, object]:
    """What swarm.toml says of a model: which it is, pinned to the hub's commit where it comes from there.

    `targets` are the run's `adapter.lora_targets` where they are given.

    Raises:
        UnknownModel, UnsupportedModel: it cannot be found, or not cut into spans.
        BadAdapter: it has no module of some target's name.
    """
    source = find_model(name, revision=revision, cache_dir=cache_dir)
    if isinstance(targets, (list, tuple)) and tuple(targets) != AUTO_TARGETS:
        all_unit_shapes(LoraSettings(targets=tuple(targets), seed=0), source)
    local = Path(name).expanduser()
    return {
        "name": str(local.resolve()) if source.hub_id is None and local.exists() else name,
        "fingerprint": source.fingerprint,
        "num_blocks": source.num_blocks,
        "revision": source.revision or "",
        "weights": weights_marks(source),
    }


def find_run_model(spec: RunSpec, local: str | None, cache_dir: Path) -> ModelSource:
    """The run's model, from a local copy where one is named.

    Raises:
        UnknownModel: it cannot be found.
        BadConfig: what was found is another model than the run's.
    """
    wanted = spec.model
    source = find_model(local or wanted.name, revision=wanted.revision or None, cache_dir=cache_dir)
    if source.fingerprint != wanted.fingerprint or source.num_blocks != wanted.num_blocks:
        raise BadConfig(
            f"{local or wanted.name} on this machine is another model than the run's ({wanted.name}); "
            "give the right one with --model"
        )
    return source


def check_weights(source: ModelSource, spec: RunSpec, parts: Iterable[int]) -> None:
    """Refuse weights of another model of the same shape; see blocks.weights_mark for `parts`.

    Raises:
        BadConfig: some part's values are not the run's.
    """
    wrong = wrong_parts(source, spec.model.weights, parts)
    if wrong:
        raise BadConfig(
            f"the weights in {source.path} are not those of the run's model ({spec.model.name}), though the "
            "architecture is the same; give the right ones with --model"
        )
