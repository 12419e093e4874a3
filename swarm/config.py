"""The settings of a run as frozen values, checked at birth. Reading and writing swarm.toml is in config_file.py."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from typing import TypeVar

from averaging.recipe import CODECS, LOCALS, MERGINGS, MOMENTS, OUTERS, ROBUST, WEIGHTINGS, Recipe
from blocks.checks import shown
from blocks.spans import MAX_BLOCKS
from peers.streams.wire_format import WireFormat
from swarm.errors import BadConfig

T = TypeVar("T")

AUTO_TARGETS = ("auto",)
WIRE_FORMATS = tuple(str(wire) for wire in (WireFormat.BF16, WireFormat.EIGHT_BIT, WireFormat.FP32))
_MAX_SAMPLES = 10**12
_MAX_TARGETS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What one setting may be, and the words that swarm.toml shows beside it."""

    help: str
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    pattern: str = ""
    expects: str = ""


def _setting(default: T, rule: Rule) -> T:
    """A field with a default and its rule; typed as the default, so that a dataclass reads naturally."""
    return field(default=default, metadata={"rule": rule})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """Which frozen model the run trains on.

    Raises:
        BadConfig: a setting is out of range, as for all sections.
    """

    name: str = field(
        metadata={
            "rule": Rule(help="hub id, directory, GGUF file, or package:NAME for one in a Python package", high=512)
        }
    )
    fingerprint: str = field(
        metadata={
            "rule": Rule(
                help="sha256 that names these weights; peers compare it",
                pattern=r"[0-9a-f]{64}",
                expects="64 hex digits",
            )
        }
    )
    num_blocks: int = field(metadata={"rule": Rule(help="transformer layers in the model", low=1, high=MAX_BLOCKS)})
    revision: str = _setting("", Rule(help="branch, tag or commit on the hub; empty for the default", high=128))
    weights: str = _setting(
        "",
        Rule(
            help="a few values of each block, hashed, so that no peer computes with another model's",
            pattern=r"[0-9a-f]{0,2048}",
            expects="hex digits, as `swarm init` wrote them",
            high=2048,
        ),
    )
    compute_dtype: str = _setting(
        "auto", Rule(help="what hosts compute in unless they say --dtype", choices=("auto", "bf16", "fp32"))
    )

    def __post_init__(self) -> None:
        _check("model", self)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSettings:
    """The LoRA that the run trains, the same for every peer."""

    name: str = _setting(
        "default",
        Rule(
            help="the adapter's name in unit ids",
            pattern=r"[A-Za-z0-9_-]{1,64}",
            expects="1 to 64 letters, digits, '_' or '-'",
        ),
    )
    lora_rank: int = _setting(8, Rule(help="rank of the two LoRA matrices", low=1, high=1024))
    lora_alpha: float = _setting(
        16.0, Rule(help="LoRA scale; the update is multiplied by alpha / rank", low=1e-6, high=1e6)
    )
    lora_dropout: float = _setting(
        0.0, Rule(help="probability of dropping an input of LoRA in training", low=0, high=0.95)
    )
    lora_targets: tuple[str, ...] = _setting(
        AUTO_TARGETS, Rule(help='"auto", or module names such as ["q_proj", "v_proj"]', pattern=r"[A-Za-z0-9_.]{1,128}")
    )
    seed: int = _setting(
        0, Rule(help="from which untouched adapters start, equal on every peer", low=0, high=2**63 - 1)
    )

    def __post_init__(self) -> None:
        _check("adapter", self)
        if len(self.lora_targets) > 1 and "auto" in self.lora_targets:
            raise BadConfig('adapter.lora_targets mixes "auto" with module names; use one or the other')

    @property
    def auto_targets(self) -> bool:
        """Whether the targets are left to the model's own projections."""
        return self.lora_targets == AUTO_TARGETS


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """How hosts step. Everything counts in samples, so that it does not depend on how many peers there are."""

    batch_size: int = _setting(32, Rule(help="samples per optimizer step of a host", low=1, high=2**20))
    sequence_length: int = _setting(512, Rule(help="tokens per sample; longer rows are cut", low=2, high=2**20))
    learning_rate: float = _setting(2e-4, Rule(help="peak learning rate of AdamW", low=0, high=10))
    schedule: str = _setting(
        "constant",
        Rule(help="shape after the warm-up, over the run's samples", choices=("constant", "linear", "cosine")),
    )
    warmup_samples: int = _setting(
        0, Rule(help="samples until the learning rate reaches its peak", low=0, high=_MAX_SAMPLES)
    )
    total_samples: int = _setting(100_000, Rule(help="samples at which the schedule ends", low=1, high=_MAX_SAMPLES))
    weight_decay: float = _setting(0.0, Rule(help="decoupled weight decay of AdamW", low=0, high=10))
    clip_norm: float = _setting(1.0, Rule(help="largest gradient norm of one unit; 0 is off", low=0, high=1e6))

    def __post_init__(self) -> None:
        _check("training", self)
        if self.warmup_samples > self.total_samples:
            raise BadConfig(
                f"training.warmup_samples is {self.warmup_samples}, more than training.total_samples"
                f" ({self.total_samples}); lower it"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSettings:
    """When adapters are averaged, and by which rules (averaging/recipe.py)."""

    round_samples: int = _setting(
        256, Rule(help="samples of the whole run between two rounds", low=1, high=_MAX_SAMPLES)
    )
    round_seconds: float = _setting(
        0.0, Rule(help="a round begins after so many seconds with fewer samples too; 0 is never", low=0, high=2592000)
    )
    checkpoint_rounds: int = _setting(
        1, Rule(help="hosts save their state at every so many rounds, and when they stop", low=1, high=1000)
    )
    merging: str = _setting("mean", Rule(help="how adapters become one", choices=MERGINGS))
    local: str = _setting("fedavg", Rule(help="how hosts train between rounds", choices=LOCALS))
    proximal: float = _setting(0.01, Rule(help="strength of FedProx's pull to the last round", low=1e-9, high=100))
    weighting: str = _setting("samples", Rule(help="what a host's update counts by", choices=WEIGHTINGS))
    moments: str = _setting(
        "own",
        Rule(
            help="AdamW's moments: each host's own, or averaged as adapters are, for thrice the bytes", choices=MOMENTS
        ),
    )
    outer: str = _setting("none", Rule(help="optimizer that steps on what was merged", choices=OUTERS))
    outer_learning_rate: float = _setting(0.7, Rule(help="of the outer optimizer", low=1e-9, high=100))
    outer_momentum: float = _setting(0.9, Rule(help="of the outer optimizer; Adam's first beta", low=0, high=0.999999))
    codec: str = _setting("fp32", Rule(help="how updates travel, what is lost added in the next round", choices=CODECS))
    top_share: float = _setting(0.05, Rule(help="part of the values that codec topk sends", low=1e-6, high=1))
    lossless: bool = _setting(False, Rule(help="compress what travels besides, where it pays"))
    robust: str = _setting("none", Rule(help="mean that a few bad peers cannot move far", choices=ROBUST))
    overlap: bool = _setting(False, Rule(help="train on while a round runs, its result one round late"))

    def __post_init__(self) -> None:
        _check("rounds", self)
        try:
            self.recipe()
        except ValueError as error:
            raise BadConfig(str(error)) from error

    def recipe(self) -> Recipe:
        """The rules, as `averaging` takes them."""
        return Recipe(**{item.name: getattr(self, item.name) for item in fields(Recipe)})


@dataclass(frozen=True, slots=True, kw_only=True)
class WireSettings:
    """How tensors travel."""

    dtype: str = _setting(
        "bf16",
        Rule(help="of activations and gradients between peers, unless they say --wire", choices=WIRE_FORMATS),
    )

    def __post_init__(self) -> None:
        _check("wire", self)


@dataclass(frozen=True, slots=True, kw_only=True)
class SecuritySettings:
    """Who may take part."""

    private: bool = _setting(False, Rule(help="only peers that the run's owner has invited (`swarm invite`) take part"))

    def __post_init__(self) -> None:
        _check("security", self)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """All that the peers of one run agree on; its owner signs it (run.py).

    `nonce` (32 hex digits) makes two runs of one owner and name distinct; it is part of the run's id.

    Raises:
        BadConfig: a setting is of the wrong type or out of range; the message names it.
    """

    name: str = field(
        metadata={
            "rule": Rule(
                help="the run's name",
                pattern=r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}",
                expects="1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit",
            )
        }
    )
    nonce: str = field(
        metadata={
            "rule": Rule(
                help="random; with the name and the owner's key it makes the run's id, so leave it as it is",
                pattern=r"[0-9a-f]{32}",
                expects="32 hex digits",
            )
        }
    )
    model: ModelSettings
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    rounds: RoundSettings = field(default_factory=RoundSettings)
    wire: WireSettings = field(default_factory=WireSettings)
    security: SecuritySettings = field(default_factory=SecuritySettings)

    def __post_init__(self) -> None:
        _check("", self)
        for section, kind in SECTIONS.items():
            if not isinstance(getattr(self, section), kind):
                raise BadConfig(f"{section} is not a section of settings; write it as [{section}]")
        if self.rounds.round_samples < self.training.batch_size:
            raise BadConfig(
                f"rounds.round_samples is {self.rounds.round_samples}, less than training.batch_size"
                f" ({self.training.batch_size}); a round needs at least one step"
            )


Section = ModelSettings | AdapterSettings | TrainingSettings | RoundSettings | WireSettings | SecuritySettings

SECTIONS: dict[str, type[Section]] = {
    "model": ModelSettings,
    "adapter": AdapterSettings,
    "training": TrainingSettings,
    "rounds": RoundSettings,
    "wire": WireSettings,
    "security": SecuritySettings,
}


def _check(section: str, settings: Section | RunSpec) -> None:
    """Hold every ruled field of `settings` to its rule; whole numbers become floats where a float is meant."""
    for item in fields(settings):
        rule = item.metadata.get("rule")
        if rule is None:
            continue
        name = f"{section}.{item.name}" if section else item.name
        value = _checked(name, getattr(settings, item.name), str(item.type), rule)
        object.__setattr__(settings, item.name, value)  # still being born


def check_run_name(name: str) -> None:
    """Refuse what no run can be called.

    Raises:
        BadConfig: says what it can be.
    """
    rule: Rule = next(item.metadata["rule"] for item in fields(RunSpec) if item.name == "name")
    _checked_text("name", name, rule)


def _checked(name: str, value: object, kind: str, rule: Rule) -> object:
    match kind:
        case "int":
            return _checked_number(name, value, rule, whole=True)
        case "float":
            return _checked_number(name, value, rule, whole=False)
        case "str":
            return _checked_text(name, value, rule)
        case "bool":
            if not isinstance(value, bool):
                raise BadConfig(f"{name} is {value!r:.80}; use true or false")
            return value
        case _:
            return _checked_names(name, value, rule)


def _checked_number(name: str, value: object, rule: Rule, *, whole: bool) -> int | float:
    allowed = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise BadConfig(f"{name} is {shown(value)}; use a {'whole ' if whole else ''}number")
    if not rule.low <= value <= rule.high or abs(value) == math.inf:
        low, high = _bound(rule.low), _bound(rule.high)
        raise BadConfig(f"{name} is {shown(value)}; use a number from {low} to {high} ({rule.help})")
    return value if whole else float(value)


def _bound(number: float) -> str:
    """Counts in full: nobody wants to count the zeros that `1.04858e+06` leaves out."""
    return str(int(number)) if abs(number) < 10**15 and number == int(number) else f"{number:g}"


def _checked_text(name: str, value: object, rule: Rule) -> str:
    if not isinstance(value, str):
        raise BadConfig(f"{name} is {value!r:.80}; use a string in quotes")
    if rule.choices and value not in rule.choices:
        raise BadConfig(f"{name} is {value!r:.80}; use one of {', '.join(rule.choices)}")
    if rule.pattern and re.fullmatch(rule.pattern, value) is None:
        raise BadConfig(f"{name} is {value!r:.80}; use {rule.expects}")
    if len(value.encode("utf-8", "replace")) > rule.high:
        raise BadConfig(f"{name} is {len(value)} characters long; use at most {rule.high:g} bytes")
    if not value.isprintable() or (name == "model.name" and not value):
        raise BadConfig(f"{name} is {value!r:.80}; use a string that is not empty and holds no control characters")
    return value


def _checked_names(name: str, value: object, rule: Rule) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, (tuple, list)) or not 1 <= len(names) <= _MAX_TARGETS:
        raise BadConfig(f"{name} is {value!r:.80}; use {rule.help}")
    for one in names:
        if not isinstance(one, str) or re.fullmatch(rule.pattern, one) is None:
            raise BadConfig(f"{name} holds {one!r:.80}; use {rule.help}")
    return tuple(sorted(set(names)))
