"""What a run's rounds do with adapters: how they merge, step, travel and are defended. Combinations are judged here."""

from __future__ import annotations

import hashlib
from dataclasses import astuple, dataclass

MERGINGS = ("mean", "ffa", "rolora", "power")
OUTERS = ("none", "nesterov", "adam")
CODECS = ("fp32", "fp16", "int8", "int4", "topk")
ROBUST = ("none", "clip", "trimmed", "krum")
LOCALS = ("fedavg", "fedprox", "scaffold", "fednova")
_MOST_ADAM_RATE = 0.1
MOMENTS = ("own", "mean")
WEIGHTINGS = ("samples", "tokens", "equal")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The rules of a run's rounds, the same for all its peers; `digest` is part of what they must agree on.

    `merging`: how adapters become one (merging.py). `local`: how peers train between rounds: FedAvg (1602.05629),
    FedProx (1812.06127, strength `proximal`), SCAFFOLD (1910.06378), FedNova (2007.07481). `weighting`: by what peers
    count. `moments`: whether AdamW's moments stay each peer's own or are averaged as adapters are (Local Adam: DES-LOC,
    2505.22549, with one period for all). `outer`: the step on what was merged (outer.py). `codec`, `top_share`,
    `lossless`: how updates travel (codecs.py). `robust`: how a reducer combines them (robust.py). `overlap`: training
    goes on while a round runs, and what was learnt meanwhile is kept on top of its result.

    Raises:
        ValueError: a name is unknown, a value is out of range, or two rules make no sense together.
    """

    merging: str = "mean"
    local: str = "fedavg"
    proximal: float = 0.01
    weighting: str = "samples"
    moments: str = "own"
    outer: str = "none"
    outer_learning_rate: float = 0.7
    outer_momentum: float = 0.9
    codec: str = "fp32"
    top_share: float = 0.05
    lossless: bool = False
    robust: str = "none"
    overlap: bool = False

    def __post_init__(self) -> None:
        for name in ("proximal", "outer_learning_rate", "outer_momentum", "top_share"):
            object.__setattr__(self, name, float(getattr(self, name)))  # still being born; 1 and 1.0 have one digest
        named = {
            "merging": MERGINGS,
            "local": LOCALS,
            "weighting": WEIGHTINGS,
            "moments": MOMENTS,
            "outer": OUTERS,
            "codec": CODECS,
            "robust": ROBUST,
        }
        for name, choices in named.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"rounds.{name} is '{getattr(self, name)}'; use one of {', '.join(choices)}")
        if not 0 < self.top_share <= 1:
            raise ValueError(f"rounds.top_share is {self.top_share}; use more than 0 and at most 1")
        if not 0 < self.proximal <= 100:
            raise ValueError(f"rounds.proximal is {self.proximal}; use more than 0 and at most 100")
        if not 0 < self.outer_learning_rate <= 100:
            raise ValueError(
                f"rounds.outer_learning_rate is {self.outer_learning_rate}; use more than 0 and at most 100"
            )
        if self.outer == "adam" and self.outer_learning_rate > _MOST_ADAM_RATE:
            raise ValueError(
                f"rounds.outer_learning_rate is {self.outer_learning_rate}; Adam moves every value by about that much "
                f"a round, so use at most {_MOST_ADAM_RATE}, such as 0.001"
            )
        if not 0 <= self.outer_momentum < 1:
            raise ValueError(f"rounds.outer_momentum is {self.outer_momentum}; use at least 0 and less than 1")
        for first, second, why in self._quarrels():
            raise ValueError(f"rounds.{first} and rounds.{second} do not go together: {why}; change one of them")

    @property
    def can_mix(self) -> bool:
        """Whether groups with different states can average: they bring whole values and no changes (grouping.py).

        Not where holders agree on more than the values, where shares do not sum to 1, as FedNova's, or where a codec
        keeps too little of a value: what a change loses comes in the next round, and what a value loses is gone.
        """
        needs_one_state = self.merging == "power" or self.outer != "none" or self.overlap
        return not (needs_one_state or self.local in ("scaffold", "fednova") or self.codec in ("int4", "topk"))

    @property
    def can_carry(self) -> bool:
        """Whether what was trained on an older state of a unit means something on top of a newer one: not where what is
        trained, or the basis of it, changes with the round.
        """
        return self.merging not in ("rolora", "power") and self.local != "scaffold"

    @property
    def digest(self) -> str:
        """Names all rules at once: peers whose digests differ never average together."""
        return hashlib.sha256(repr(astuple(self)).encode()).hexdigest()[:16]

    def _quarrels(self) -> list[tuple[str, str, str]]:
        rules: tuple[tuple[bool, str, str, str], ...] = (
            (self.merging == "power" and self.outer != "none", "merging = 'power'", f"outer = '{self.outer}'",
             "factors of two rounds are not comparable, so their difference is no pseudo-gradient"),
            (self.merging == "power" and self.local in ("scaffold", "fednova"), "merging = 'power'",
             f"local = '{self.local}'", "they correct the factors, and power averages the products"),
            (self.merging == "power" and self.codec != "fp32", "merging = 'power'",
             f"codec = '{self.codec}'", "what a lossy codec owes cannot be paid in the next round's basis"),
            (self.merging == "power" and self.robust != "none", "merging = 'power'", f"robust = '{self.robust}'",
             "its passes carry products, which the robust means do not bound"),
            (self.robust != "none" and self.weighting != "equal", f"robust = '{self.robust}'",
             f"weighting = '{self.weighting}'", "a hostile peer would claim the largest weight; use 'equal'"),
            (self.robust != "none" and self.local == "scaffold", f"robust = '{self.robust}'", "local = 'scaffold'",
             "control variates and updates of other scales share one norm"),
            (self.robust != "none" and self.local == "fednova", f"robust = '{self.robust}'", "local = 'fednova'",
             "a hostile peer would claim one local step"),
            (self.local == "scaffold" and self.codec == "topk", "local = 'scaffold'", "codec = 'topk'",
             "control variates and updates of other scales would compete for the largest values"),
            *(
                (self.moments == "mean" and clashes, "moments = 'mean'", what, why)
                for clashes, what, why in (
                    (self.merging == "power", "merging = 'power'", "it changes what the moments are of"),
                    (self.local == "fednova", "local = 'fednova'", "its shares weigh changes, and moments are none"),
                    (self.robust != "none", f"robust = '{self.robust}'",
                     "moments and updates of other scales share one norm"),
                    (self.codec in ("int4", "topk"), f"codec = '{self.codec}'",
                     "it keeps the largest values alone, and where nothing is left of a moment steps are too long"),
                )
            ),
            (self.robust != "none" and self.codec == "topk", f"robust = '{self.robust}'", "codec = 'topk'",
             "most of what is compared would be zeros"),
        )  # fmt: skip
        rules += tuple(
            (self.overlap and clashes, "overlap = true", what, why)
            for clashes, what, why in (
                (self.merging in ("rolora", "power"), f"merging = '{self.merging}'",
                 "what is trained changes with the round, so nothing learnt meanwhile fits on top"),
                (self.local == "scaffold", "local = 'scaffold'", "its variates belong to one round's steps"),
                (self.moments == "mean", "moments = 'mean'", "the steps made meanwhile are in the moments, too"),
            )
        )  # fmt: skip
        return [(first, second, why) for holds, first, second, why in rules if holds]
