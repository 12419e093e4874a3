"""One LoRA on a span: attach it, and read and write its tensors by unit. Versions of it live side by side.

The version `live` is trained; other versions are frozen snapshots that generation uses. All adapter tensors are fp32
whatever the dtype of the frozen weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from blocks.errors import BadAdapter
from blocks.first_values import initial_tensor
from blocks.frozen_lora import freeze_on, thaw
from blocks.load import SpanModel
from blocks.part import whole_on_meta
from blocks.rng import forked_rng
from blocks.skip import find_layers
from blocks.source import ModelSource, read_config
from blocks.spans import UnitId, parse_unit, unit_of
from blocks.targets import Targets, check_targets, target_names, uses_conv1d

LIVE = "live"
MAX_RANK = 1024
MAX_VERSIONS = 32  # snapshots and published adapters in one model; bounds what callers may make it hold
UnitTensors = Mapping[str, Tensor]
"""One unit's tensors: name inside the block, such as `self_attn.q_proj.lora_A`, sorted; fp32, on the CPU."""
UnitParameters = Mapping[UnitId, Mapping[str, nn.Parameter]]

_KINDS = ("lora_A", "lora_B")
_LABEL = re.compile(r"[A-Za-z0-9_-]{1,80}")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TARGET = re.compile(r"[A-Za-z0-9_.]{1,128}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSettings:
    """What all peers of a run agree on about its LoRA (Hu et al. 2021); `seed` makes them start equal.

    `targets` are names of linear modules inside a block; `auto` takes peft's choice for the family, or all of them.
    `own_rank` alone is this peer's: it trains the leading rows of the run's factors only (0: all of them). The scale is
    alpha / rank all the same, so that its part of the factors means what it means in the whole.

    Raises:
        BadAdapter: a value is out of range.
    """

    name: str = "default"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: Targets = "auto"
    seed: int
    own_rank: int = 0

    def __post_init__(self) -> None:
        if _NAME.fullmatch(self.name) is None:
            raise BadAdapter(f"adapter.name is '{self.name[:80]}'; use 1 to 64 letters, digits, '_' or '-'")
        if not 1 <= self.rank <= MAX_RANK:
            raise BadAdapter(f"adapter.rank is {self.rank}; use 1 to {MAX_RANK}")
        if not 0 <= self.own_rank <= self.rank:
            raise BadAdapter(f"the rank of this peer is {self.own_rank}; use 1 to {self.rank}, the run's")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise BadAdapter(f"adapter.alpha is {self.alpha}; use a positive number")
        if not 0.0 <= self.dropout < 1.0:
            raise BadAdapter(f"adapter.dropout is {self.dropout}; use 0 or more and less than 1")
        if not 0 <= self.seed < 2**63:
            raise BadAdapter(f"adapter.seed is {self.seed}; use 0 or more and less than 2**63")
        if self.targets != "auto" and not (
            self.targets and all(isinstance(target, str) and _TARGET.fullmatch(target) for target in self.targets)
        ):
            raise BadAdapter(f"adapter.targets is {self.targets!r}; use 'auto' or names such as q_proj")

    @property
    def live_rank(self) -> int:
        """The rank that is trained here."""
        return self.own_rank or self.rank

    @property
    def scaling(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / self.rank


def attach(model: SpanModel, settings: LoraSettings) -> None:
    """Put the LoRA's `live` version on every held block, initialised as every peer of the run does it.

    Raises:
        BadAdapter: an adapter is attached already, or no module has one of the targets' names.
    """
    if model.settings is not None:
        raise BadAdapter(f"'{model.settings.name}' is attached already; load the span again for another adapter")
    names = [
        f"{model.cut.layers_name}.{number}.{name}"
        for number, layer in model.cut.held.items()
        for name in target_names(layer, settings.targets, model.config)
    ]
    if not names:
        raise BadAdapter(
            f"blocks {model.span} of {model.source.name} have no module {settings.targets}; change adapter.lora_targets"
        )
    config = LoraConfig(
        r=settings.live_rank,
        lora_alpha=settings.scaling * settings.live_rank,
        lora_dropout=settings.dropout,
        target_modules=names,
        fan_in_fan_out=uses_conv1d(model.cut.held[model.span.start]),
    )
    with forked_rng():  # peft draws an initialisation that is overwritten below
        inject_adapter_in_model(config, model.module, adapter_name=LIVE)
    for lora in _all_lora(model):
        lora.lora_A.float()
        lora.lora_B.float()
    model.settings = settings
    model.module.eval()
    with torch.no_grad():
        for unit, parameters in parameters_by_unit(model).items():
            for name, parameter in parameters.items():
                parameter.copy_(initial_tensor(settings.seed, unit, name, tuple(parameter.shape)))


def parameters_by_unit(model: SpanModel, version: str = LIVE) -> dict[UnitId, dict[str, nn.Parameter]]:
    """The parameters of a version, by unit and by name in the block, sorted; of `live` they are what is trained.

    Raises:
        BadAdapter: there is no such version.
    """
    settings = settings_of(model)
    found: dict[UnitId, dict[str, nn.Parameter]] = {}
    for number, layer in sorted(model.cut.held.items()):
        named: dict[str, nn.Parameter] = {}
        for name, lora in _lora_layers(layer):
            for kind in _KINDS:
                modules = cast(nn.ModuleDict, getattr(lora, kind))
                if version not in modules:
                    raise BadAdapter(f"the span {model.span} has no adapter version '{version}'; add it first")
                named[f"{name}.{kind}"] = cast(nn.Parameter, modules[version].weight)
        if named:
            found[unit_of(settings.name, number)] = dict(sorted(named.items()))
    return found


def settings_of(model: SpanModel) -> LoraSettings:
    """The settings of the attached adapter.

    Raises:
        BadAdapter: none is attached.
    """
    if model.settings is None:
        raise BadAdapter(f"the span {model.span} has no adapter; attach one first")
    return model.settings


def read_units(model: SpanModel, version: str = LIVE) -> dict[UnitId, UnitTensors]:
    """Copies of a version's tensors, by unit.

    Raises:
        BadAdapter: there is no such version.
    """
    return read_parameters(parameters_by_unit(model, version))


def write_units(model: SpanModel, units: Mapping[UnitId, UnitTensors], version: str = LIVE) -> None:
    """Put tensors into a version, in place. Units that are not given stay. All of it is checked before any is written.

    Raises:
        BadAdapter: a unit is not held here, or a name, shape or value does not fit.
    """
    write_parameters(parameters_by_unit(model, version), units)


def read_parameters(parameters: UnitParameters) -> dict[UnitId, UnitTensors]:
    """Copies of parameters, whatever model they are in, by unit."""
    return {
        unit: {name: parameter.detach().to("cpu", torch.float32, copy=True) for name, parameter in named.items()}
        for unit, named in parameters.items()
    }


def write_parameters(into: UnitParameters, units: Mapping[UnitId, UnitTensors]) -> None:
    """See `write_units`."""
    for unit, tensors in units.items():
        if unit not in into:
            raise BadAdapter(f"unit {unit} is not held here; send it to a holder")
        check_unit(unit, tensors, {name: tuple(parameter.shape) for name, parameter in into[unit].items()})
    with torch.no_grad():
        for unit, tensors in units.items():
            for name, parameter in into[unit].items():
                parameter.copy_(tensors[name])


def check_unit(unit: UnitId, tensors: UnitTensors, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors that are not exactly the unit's.

    Raises:
        BadAdapter: names, shapes or kinds differ, or a value is not finite.
    """
    if set(tensors) != set(shapes):
        odd = sorted(set(tensors) ^ set(shapes))[0]
        raise BadAdapter(f"{unit} has other tensors than expected, such as '{odd[:80]}'; use the run's settings")
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise BadAdapter(f"{unit} {name} is {tuple(tensor.shape)} {tensor.dtype}; it must be {shape}, floating")
        if not bool(torch.isfinite(tensor).all()):
            raise BadAdapter(f"{unit} {name} has values that are not finite; drop it and fetch it again")


def add_version(model: SpanModel, label: str, units: Mapping[UnitId, UnitTensors]) -> None:
    """Keep a frozen snapshot of the adapter under `label`; units that are not given are copied from `live`.

    Raises:
        BadAdapter: the label is taken or malformed, there are too many versions, or the tensors do not fit.
    """
    if label == LIVE or _LABEL.fullmatch(label) is None:
        raise BadAdapter(f"'{label[:80]}' cannot name an adapter version; use 1 to 80 letters, digits, '_' or '-'")
    if label in versions(model):
        raise BadAdapter(f"the adapter version '{label}' exists already; drop it first")
    if len(versions(model)) > MAX_VERSIONS:
        raise BadAdapter(f"{MAX_VERSIONS} adapter versions are in use; drop one first")
    try:
        for lora in _all_lora(model):
            for kind in _KINDS:
                modules = cast(nn.ModuleDict, getattr(lora, kind))
                modules[label] = _frozen_copy(cast(nn.Linear, modules[LIVE]), kind, settings_of(model).rank)
            cast(nn.ModuleDict, lora.lora_dropout)[label] = nn.Identity()
            lora.scaling[label] = lora.scaling[LIVE]
        write_units(model, units, label)
        if not any(bool(cast(nn.Linear, lora.lora_B[label]).weight.any()) for lora in _all_lora(model)):
            model.empty_versions.add(label)
    except BadAdapter:
        _remove(model, label)
        raise


def use_version(model: SpanModel, label: str = LIVE) -> None:
    """Let the next passes compute with this version. Cheap; what is trained does not change.

    Raises:
        BadAdapter: there is no such version.
    """
    if label == model.version:
        return
    if label != LIVE and label not in versions(model):
        raise BadAdapter(f"the span {model.span} has no adapter version '{label}'; add it first")
    for lora in _all_lora(model):
        lora._active_adapter = [label]  # not set_adapter(), which would stop the gradients of `live`
        thaw(lora)
        if label != LIVE:  # what adds zeros is not computed
            freeze_on(lora, label, adds_nothing=label in model.empty_versions)
    model.version = label


def drop_version(model: SpanModel, label: str) -> None:
    """Forget a snapshot.

    Raises:
        BadAdapter: there is no such snapshot.
    """
    if label == LIVE or label not in versions(model):
        raise BadAdapter(f"there is no adapter version '{label[:80]}' to drop; see versions()")
    if model.version == label:
        use_version(model, LIVE)
    _remove(model, label)


def versions(model: SpanModel) -> tuple[str, ...]:
    """The labels of all versions, `live` first."""
    settings_of(model)
    return tuple(cast(nn.ModuleDict, next(_all_lora(model)).lora_A).keys())


def live_dropouts(model: SpanModel) -> list[nn.Module]:
    """The dropout modules of `live`, to be on while it is trained."""
    return [cast(nn.ModuleDict, lora.lora_dropout)[LIVE] for lora in _all_lora(model)]


def unit_digest(tensors: UnitTensors) -> bytes:
    """The sha256 over names, shapes and fp32 bytes: equal tensors, equal digest, on every machine."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.numpy().astype("<f4", copy=False).tobytes())
    return digest.digest()


def unit_shapes(model: SpanModel) -> dict[UnitId, dict[str, tuple[int, ...]]]:
    """The names and shapes of the tensors of every held unit, at the run's rank."""
    return shapes_at(parameters_by_unit(model), settings_of(model).rank)


def shapes_at(parameters: UnitParameters, rank: int) -> dict[UnitId, dict[str, tuple[int, ...]]]:
    """The shapes that parameters have at another rank than theirs."""
    return {
        unit: {
            name: (rank, parameter.shape[1]) if name.endswith("lora_A") else (parameter.shape[0], rank)
            for name, parameter in named.items()
        }
        for unit, named in parameters.items()
    }


def at_rank(tensors: UnitTensors, rank: int) -> dict[str, Tensor]:
    """The leading `rank` rows of A and columns of B: what a peer of that rank trains."""
    return {name: t[:rank] if name.endswith("lora_A") else t[:, :rank] for name, t in tensors.items()}


def all_unit_shapes(settings: LoraSettings, source: ModelSource) -> dict[UnitId, dict[str, tuple[int, ...]]]:
    """The names and shapes of every unit of the whole model, held here or not; needs its config only.

    Raises:
        BadAdapter: no block has a module of one of the targets' names.
    """
    config = read_config(source)
    _, layers = find_layers(whole_on_meta(config), source.num_blocks)
    check_targets(layers, settings.targets, source.name)
    found: dict[UnitId, dict[str, tuple[int, ...]]] = {}
    for number, layer in enumerate(layers):
        shapes: dict[str, tuple[int, ...]] = {}
        for name in target_names(layer, settings.targets, config):
            weight = cast(Tensor, layer.get_submodule(name).weight)
            outputs, inputs = weight.shape if isinstance(layer.get_submodule(name), nn.Linear) else weight.shape[::-1]
            shapes[f"{name}.lora_A"] = (settings.rank, inputs)
            shapes[f"{name}.lora_B"] = (outputs, settings.rank)
        if shapes:
            found[unit_of(settings.name, number)] = dict(sorted(shapes.items()))
    return found


def layout_digest(
    settings: LoraSettings, source: ModelSource, shapes: Mapping[UnitId, Mapping[str, tuple[int, ...]]] | None = None
) -> bytes:
    """The sha256 of what two peers must agree on to average: the model's fingerprint, and all names and `shapes`
    (`all_unit_shapes`, for who has called it already).
    """
    units = {str(unit): named for unit, named in (shapes or all_unit_shapes(settings, source)).items()}
    agreed = {"model": source.fingerprint, "alpha": settings.alpha, "seed": settings.seed, "units": units}
    return hashlib.sha256(json.dumps(agreed, sort_keys=True).encode()).digest()


def block_of(unit: UnitId) -> int:
    """The block that a unit belongs to."""
    return parse_unit(unit)[1]


def _lora_layers(layer: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in layer.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _all_lora(model: SpanModel) -> Iterator[LoraLayer]:
    for layer in model.cut.held.values():
        for _, lora in _lora_layers(layer):
            yield lora


def _frozen_copy(linear: nn.Linear, kind: str, rank: int) -> nn.Linear:
    """A factor at the run's rank; what is trained here may be of a smaller one, and the rest is zero."""
    inputs, outputs = (linear.in_features, rank) if kind == "lora_A" else (rank, linear.out_features)
    # Made without memory, it draws no weights: nobody else's dice are to move.
    copied = nn.Linear(inputs, outputs, bias=False, dtype=torch.float32, device="meta")
    copied = copied.to_empty(device=linear.weight.device)
    with torch.no_grad():
        copied.weight.zero_()
        copied.weight[: linear.out_features, : linear.in_features].copy_(linear.weight)
    return copied.requires_grad_(False)


def _remove(model: SpanModel, label: str) -> None:
    model.empty_versions.discard(label)
    for lora in _all_lora(model):
        for modules in (lora.lora_A, lora.lora_B, lora.lora_dropout):
            if label in modules:
                del modules[label]
        lora.scaling.pop(label, None)
